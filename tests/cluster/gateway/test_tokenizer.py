import json

import pytest
from serving import TOKENIZER

from quire.cluster.gateway.tokenizer import ChatTokenizer, PromptSource
from quire.cluster.gateway.tokenizing import Tokenizing
from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import ConfigError, ModelNotServable


async def test_templates_of_a_folder_of_their_own_are_kept_apart_from_the_models():
    hello = [inference_pb2.ChatMessage(role="user", content="Hello")]
    own = json.loads(TOKENIZER["tokenizer_config.json"])["chat_template"].encode()
    other = {"chat_template.jinja": own, "additional_chat_templates/tools.jinja": b"none of this"}
    ids = [
        await ChatTokenizer(files, Tokenizing()).encode(PromptSource(messages=hello), 100)
        for files in (TOKENIZER, {**TOKENIZER, **other})
    ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("path", ["../tokenizer.json", "/tmp/tokenizer.json", "a/../../b"])
def test_no_file_is_written_outside_the_tokenizers_folder(path):
    with pytest.raises(ConfigError, match="leads out of its folder"):
        ChatTokenizer({**TOKENIZER, path: b"{}"}, Tokenizing())


def test_files_that_make_no_tokenizer_are_named():
    with pytest.raises(ConfigError, match=r"no tokenizer could be read from notes\.txt"):
        ChatTokenizer({"notes.txt": b"a"}, Tokenizing())
    with pytest.raises(ModelNotServable, match=r"tokenizer\.json is no"):
        ChatTokenizer({**TOKENIZER, "tokenizer.json": b"{}"}, Tokenizing())

"""Prompts from texts and chats: special tokens once and in front only, and long texts refused in time."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import quire.replicas
from quire.replicas.errors import InvalidRequest
from quire.replicas.text.prompt import ChatMessage
from quire.replicas.text.tokenize import PromptTokenizer, Stopped

DEMO = Path(quire.replicas.__file__).parent / "demo_model"
BOS, EOS = 1, 2
HELLO = (ChatMessage("user", "Hello!"),)
MOST = 100
WORDS = "the cat sat on a mat and looked at the river "


def _tokenizer(folder, *, json_changes=None, **config):
    """The demo model's, with other files: `json_changes` of tokenizer.json, the rest of its configuration."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    for name, changes in (("tokenizer.json", json_changes or {}), ("tokenizer_config.json", config)):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return AutoTokenizer.from_pretrained(folder)


def _added(*, front=(), back=()):
    """A post-processor that puts special tokens around a text."""
    names = {BOS: "<|bos|>", EOS: "<|eos|>"}
    special = [[{"SpecialToken": {"id": names[i], "type_id": 0}} for i in ids] for ids in (front, back)]
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*special[0], {"Sequence": {"id": "A", "type_id": 0}}, *special[1]],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in {*front, *back}
            },
        }
    }


@pytest.fixture(scope="module")
def demo():
    return PromptTokenizer(AutoTokenizer.from_pretrained(DEMO))


def test_a_text_is_what_the_models_tokenizer_makes_of_it(demo):
    text = "Long ago, a cat named Lucas \u00e9\U0001f98a"
    assert demo.encode(text, MOST) == AutoTokenizer.from_pretrained(DEMO).encode(text)
    assert demo.encode("", MOST) == [BOS]


@pytest.mark.parametrize(("front", "back"), [((BOS,), (EOS,)), ((), (EOS,)), ((BOS, BOS), (EOS, EOS))])
def test_what_a_tokenizer_appends_does_not_end_the_prompt(tmp_path, front, back):
    tokenizer = _tokenizer(tmp_path, json_changes=_added(front=front, back=back))
    assert tokenizer.encode("Once")[-1] == EOS
    ids = PromptTokenizer(tokenizer).encode("Once", MOST)
    assert ids == [*front, *tokenizer.encode("Once", add_special_tokens=False)]


def test_the_token_in_front_is_there_once(demo, tmp_path):
    assert demo.encode("<|bos|>Once", MOST) == demo.encode("Once", MOST)
    assert demo.encode("<|bos|>Once", MOST).count(BOS) == 1
    two = PromptTokenizer(_tokenizer(tmp_path, json_changes=_added(front=(EOS, BOS))))
    for text in ("Once", "<|bos|>Once", "<|eos|><|bos|>Once"):
        assert two.encode(text, MOST)[:3] == [EOS, BOS, *two.encode("Once", MOST)[2:3]]


def test_a_chat_begins_as_its_template_says(demo, tmp_path):
    assert demo.encode_chat(HELLO, MOST).count(BOS) == 1
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    bare = PromptTokenizer(_tokenizer(tmp_path, chat_template=template))
    assert bare.encode_chat(HELLO, MOST) == bare.encode("Hello!", MOST)[1:]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[9].content.x.y }}", "UndefinedError"),
        ("{{ messages[0]['content'] + 5 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0]['content'].nothing() }}", "UndefinedError"),
        ("{{ {}.popitem() }}", "SecurityError|KeyError|UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_a_template_that_refuses_or_fails_says_so_in_its_own_words(tmp_path, template, said):
    broken = PromptTokenizer(_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(InvalidRequest, match=f"chat template refuses these messages: .*({said})"):
        broken.encode_chat(HELLO, MOST)


def test_no_template_and_no_messages_are_said(demo, tmp_path):
    with pytest.raises(InvalidRequest, match="no messages"):
        demo.encode_chat((), MOST)
    with pytest.raises(InvalidRequest, match="no chat template"):
        PromptTokenizer(_tokenizer(tmp_path, chat_template=None)).encode_chat(HELLO, MOST)
    with pytest.raises(InvalidRequest, match="has 101 messages"):
        demo.encode_chat(HELLO * 101, MOST)


class _Counted(PromptTokenizer):
    """Notes how many characters it was given to tokenize."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.characters = []

    def _encoded(self, text):
        self.characters.append(len(text))
        return super()._encoded(text)


NFC = {"normalizer": {"type": "NFC"}}
"""It may make texts shorter, so that nothing is sure from a length alone."""


def test_a_text_that_surely_is_too_long_is_refused_from_its_length():
    tokenizer = _Counted(AutoTokenizer.from_pretrained(DEMO))
    with pytest.raises(InvalidRequest, match="1048576 characters are more than 100 tokens"):
        tokenizer.encode("x" * (1 << 20), MOST)
    with pytest.raises(InvalidRequest, match="characters are more than 100 tokens"):
        tokenizer.encode_chat((ChatMessage("user", WORDS * 10_000),), MOST)
    assert not tokenizer.characters


def test_where_that_is_not_sure_its_first_slices_decide(tmp_path):
    tokenizer = _Counted(_tokenizer(tmp_path, json_changes=NFC))
    with pytest.raises(InvalidRequest, match="are more than 1000 tokens"):
        tokenizer.encode(WORDS * 100_000, 1000)
    assert sum(tokenizer.characters) < 40_000


def test_what_shrinks_to_a_prompt_is_no_long_text(tmp_path):
    """Whatever drops characters does so in a slice as in the whole."""
    strip = {"normalizer": {"type": "Replace", "pattern": {"String": "x"}, "content": ""}}
    tokenizer = PromptTokenizer(_tokenizer(tmp_path, json_changes=strip))
    assert tokenizer.encode("x" * 200_000 + "Once", MOST) == tokenizer.encode("Once", MOST)


@pytest.mark.parametrize("changes", [{}, NFC])
@pytest.mark.parametrize("text", [WORDS * 1200, "x" * 30_000, "\u6f22\u5b57" * 9_000, " " * 30_000])
def test_no_text_that_fits_is_refused(tmp_path, changes, text):
    tokenizer = PromptTokenizer(_tokenizer(tmp_path, json_changes=changes))
    tokens = len(tokenizer.encode(text, 10**9))
    assert len(tokenizer.encode(text, tokens)) == tokens
    with pytest.raises(InvalidRequest, match="tokens"):
        tokenizer.encode(text, tokens - 1)


def test_nobody_who_waits_no_more_is_worked_for(tmp_path):
    tokenizer = _Counted(_tokenizer(tmp_path, json_changes=NFC))
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        tokenizer.encode(WORDS * 10_000, 10_000, lambda: next(asked))
    assert sum(tokenizer.characters) < 60_000

from pathlib import Path

import pytest
from tokenizers import Tokenizer

import quire.replicas
from quire.replicas.detokenize import Detokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(Path(quire.replicas.__file__).parent / "demo_model/tokenizer.json"))


def _pieces(tokenizer, text, **kwargs) -> list[str]:
    detokenizer = Detokenizer(tokenizer, [1], **kwargs)
    return [detokenizer.push(t)[0] for t in tokenizer.encode(text, add_special_tokens=False).ids]


def test_characters_are_never_split(tokenizer):
    text = " naïve 日本 🦊 fox"
    pieces = _pieces(tokenizer, text)
    assert "".join(pieces) == text
    assert "" in pieces  # some token really ended inside a character
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_at_the_end_stays_unsaid(tokenizer):
    detokenizer = Detokenizer(tokenizer, [1])
    *most, _ = tokenizer.encode(" a🦊", add_special_tokens=False).ids
    said = "".join(detokenizer.push(t)[0] for t in most) + detokenizer.finish()
    assert said == " a"


def test_text_ends_before_a_stop_text_that_spans_tokens(tokenizer):
    detokenizer = Detokenizer(tokenizer, [1], stop=("the fox", "never"))
    said, stopped = "", False
    for token in tokenizer.encode(" Once the dog and the fox went", add_special_tokens=False).ids:
        text, stopped = detokenizer.push(token)
        said += text
        if stopped:
            break
    assert stopped
    assert said == " Once the dog and "


def test_what_looked_like_a_stop_text_is_said_later(tokenizer):
    text = " and the fog"
    assert "".join(_pieces(tokenizer, text, stop=("the fox",))) == text
    detokenizer = Detokenizer(tokenizer, [1], stop=(" fog and mist",))
    said = "".join(detokenizer.push(t)[0] for t in tokenizer.encode(text, add_special_tokens=False).ids)
    assert said == " and the"
    assert detokenizer.finish() == " fog"


def test_stop_texts_wait_for_min_tokens(tokenizer):
    detokenizer = Detokenizer(tokenizer, [1], stop=("fox",))
    token, *_ = tokenizer.encode(" fox", add_special_tokens=False).ids
    assert not detokenizer.push(token, may_stop=False)[1]


def test_special_tokens_are_not_text(tokenizer):
    detokenizer = Detokenizer(tokenizer, [1])
    assert detokenizer.push(tokenizer.token_to_id("<|end|>")) == ("", False)

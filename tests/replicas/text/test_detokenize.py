import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

import quire.replicas
from quire.replicas.text.detokenize import Detokenizer, special_tokens


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


def test_bytes_that_form_no_text_do_not_end_the_stream():
    """As models with byte tokens can produce: an ASCII byte, half a character, then a word."""
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)} | {"b": 257}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    rng = random.Random(0)
    for _ in range(300):
        detokenizer = Detokenizer(tokenizer, [257])
        said = "".join(detokenizer.push(rng.randrange(1, 258))[0] for _ in range(25))
        assert isinstance(said, str)
    detokenizer = Detokenizer(tokenizer, [257])
    said = "".join(detokenizer.push(t)[0] for t in (0x41 + 1, 0xC3 + 1, 257, 257))
    assert said.endswith("bb")


def _llama2() -> Tokenizer:
    """Words begin with ▁, other characters are byte tokens, and a text's first space is dropped."""
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)} | {"▁fox": 257, "a": 258}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def test_a_word_after_a_prompt_of_byte_tokens_keeps_its_space():
    fox_in_bytes = [byte + 1 for byte in "🦊🦊".encode()]
    detokenizer = Detokenizer(_llama2(), fox_in_bytes)  # the context begins inside the first character
    assert [detokenizer.push(257)[0] for _ in range(2)] == [" fox", " fox"]


def test_a_character_that_the_prompt_began_is_completed_by_the_output():
    *most, last = [byte + 1 for byte in "🦊".encode()]
    detokenizer = Detokenizer(_llama2(), [258, *most])
    assert [detokenizer.push(t)[0] for t in (last, 257)] == ["🦊", " fox"]


def test_bytes_that_never_form_a_character_are_shown_as_unknown(tokenizer):
    *_, last = tokenizer.encode("🦊", add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer, [1])
    said = "".join(detokenizer.push(last)[0] for _ in range(100))
    assert set(said) == {"\ufffd"}
    assert 90 <= len(said) <= 100


@pytest.mark.parametrize("text", [" fox", "<|end|>", "🦊"])
def test_a_token_costs_the_same_however_long_the_output_is(tokenizer, text):
    class Counting:
        longest = 0

        def decode(self, tokens, **options):
            self.longest = max(self.longest, len(tokens))
            return tokenizer.decode(tokens, **options)

    counting = Counting()
    detokenizer = Detokenizer(counting, [1], special=special_tokens(tokenizer))
    *_, token = tokenizer.encode(text, add_special_tokens=False).ids
    for _ in range(500):
        detokenizer.push(token)
    assert counting.longest < 30


def test_any_text_comes_out_as_it_went_in(tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        text = " " + "".join(rng.choice(["a", " fox", "é", "日本", "🦊", "\n", "  "]) for _ in range(30))
        assert "".join(_pieces(tokenizer, text)) == text


def test_special_tokens_are_not_text(tokenizer):
    detokenizer = Detokenizer(tokenizer, [1])
    assert detokenizer.push(tokenizer.token_to_id("<|end|>")) == ("", False)

"""The columns of a report against a hand-made response, and the texts of tokens."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from teacher_server.http.analysis import Judge, ids_in, model_columns
from teacher_server.http.rendering import form_of, json_bytes
from teacher_server.http.texts import MAX_POSITIONS, Tokenizing, TokenTexts, differences
from teacher_wire.drift_metrics import OverlapRatio, TeacherTopPAccept
from teacher_wire.errors import InvalidRequestError
from teacher_wire.records import DriftPolicy, ModelRows, TokenSpan
from tests.teacher.http.http_teacher import SPECIALS, symbol_tokenizer

POLICY = DriftPolicy(metric=OverlapRatio(k=2, threshold=0.7), w_drop=0.5)
TEXTS = TokenTexts(symbol_tokenizer())
HALF, QUARTER = math.log(0.5), math.log(0.25)
SPAN = TokenSpan(
    offset=0,
    token_ids=np.array([1, 2, 3], np.int32),
    candidate_ids=np.array([[1, 4], [4, 9], [8, 9]], np.int32),
)
ROWS = ModelRows(
    topk_ids=np.array([[1, 4], [4, 5], [4, 3]], np.int32),
    topk_logprobs=np.array([[HALF, QUARTER]] * 3, np.float32),
    token_logprobs=np.array([HALF, -4.0, QUARTER], np.float32),
    candidate_logprobs=np.zeros((3, 2), np.float32),
    entropies=np.array([1.0, 1.25, 1.5], np.float32),
    token_ranks=np.array([1, 9, 2], np.int32),
)


def cut(rows: ModelRows, span: TokenSpan, start: int, stop: int) -> tuple[ModelRows, TokenSpan]:
    where = slice(start, stop)
    arrays = {f.name: getattr(rows, f.name)[where] for f in dataclasses.fields(rows)}
    assert span.candidate_ids is not None
    part = TokenSpan(
        offset=start, token_ids=span.token_ids[where], candidate_ids=span.candidate_ids[where]
    )
    return ModelRows(**arrays), part


def test_a_bad_token_already_counts_against_itself() -> None:
    judge = Judge(POLICY)
    columns = judge.columns(ROWS, SPAN)
    assert columns["overlap"].tolist() == [1.0, 0.5, 0.0]  # type: ignore[union-attr]
    assert columns["bad_events"].tolist() == [False, True, True]  # type: ignore[union-attr]
    assert columns["reliability"].tolist() == [1.0, 0.5, 0.0]  # type: ignore[union-attr]
    assert judge.summary() == {
        "num_bad_events": 2,
        "exhausted_at": 3,
        "verdict": "truncate",
        "keep_tokens": 3,
        "policy": {
            "metric": "overlap_ratio",
            "k": 2,
            "threshold": 0.7,
            "w_drop": 0.5,
            "stop_in_flight": True,
        },
    }


@pytest.mark.parametrize("policy", [None, POLICY, DriftPolicy(metric=TeacherTopPAccept(k=1))])
def test_pieces_are_judged_as_the_whole(policy: DriftPolicy | None) -> None:
    whole, pieces = Judge(policy), Judge(policy)
    expected = whole.columns(ROWS, SPAN)
    parts = [pieces.columns(*cut(ROWS, SPAN, start, stop)) for start, stop in ((0, 1), (1, 3))]
    for name, array in expected.items():
        if array is None:
            assert [part[name] for part in parts] == [None, None]
        else:
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(joined, array, name)
    assert pieces.summary() == whole.summary()


def test_what_was_not_asked_for_is_none_and_never_a_number() -> None:
    bare = dataclasses.replace(ROWS, candidate_logprobs=None, entropies=None, token_ranks=None)
    span = dataclasses.replace(SPAN, candidate_ids=None)
    judge = Judge(None)
    columns = {**model_columns(bare, span, 2), **judge.columns(bare, span)}
    missing = {name for name, array in columns.items() if array is None}
    assert missing == {
        *("candidate_ids", "teacher_logprobs_at_candidates", "entropies", "ranks"),
        *("overlap", "bad_events", "reliability"),
    }
    told = judge.summary()
    assert told.pop("verdict") == "continue"
    assert set(told.values()) == {None}


def test_overlap_without_a_policy_is_a_share_of_what_was_compared() -> None:
    assert Judge(None).columns(ROWS, SPAN)["overlap"].tolist() == [1.0, 0.5, 0.0]  # type: ignore[union-attr]


def test_of_a_wider_top_k_only_what_was_asked_for_is_shown() -> None:
    columns = model_columns(ROWS, SPAN, 1)
    assert columns["teacher_topk_ids"].tolist() == [[1], [4], [4]]  # type: ignore[union-attr]
    assert ids_in(columns["teacher_topk_ids"], None, np.array([7])) == [1, 4, 7]


VALUES = st.one_of(
    st.integers(-5, 5), st.text(max_size=3), st.none(), st.lists(st.integers(0, 3), max_size=3)
)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 5000), st.integers(1, 9)),
    others=st.dictionaries(st.text(max_size=4), VALUES, max_size=4),
)
def test_json_in_blocks_is_json(shape: tuple[int, int], others: dict[str, Any]) -> None:
    """The large array goes through in several blocks."""
    array = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    content = {**others, "array": array, "nested": [{"a": array[:2]}, {"b": 1}], "empty": []}
    found = json.loads(json_bytes(content))
    expected = {**others, "array": array.tolist(), "nested": [{"a": array[:2].tolist()}, {"b": 1}]}
    assert found == {**expected, "empty": []}


def test_a_float32_comes_back_to_the_bit() -> None:
    numbers = -np.random.default_rng(0).exponential(3.0, 1000).astype(np.float32)
    found = np.array(json.loads(json_bytes({"x": numbers}))["x"], np.float32)
    np.testing.assert_array_equal(found, numbers)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/html, application/x-ndjson;q=0.5", "application/x-ndjson"),
        ("Application/VND.apache.arrow.stream", "application/vnd.apache.arrow.stream"),
    ],
)
def test_the_first_form_of_ours_that_is_named_is_taken(accept: str, form: str) -> None:
    assert form_of(accept) == form


def test_an_id_outside_the_vocabulary_has_no_text() -> None:
    assert TEXTS[9999] is None
    assert TEXTS[15] == "é"
    assert TEXTS.of([15, 9999, 0]) == {"15": "é", "0": "0"}
    assert TokenTexts(None).of([1]) == {}


def metaspace_tokenizer() -> Tokenizer:
    """A decoder that strips the space which starts a text, as sentencepiece models have."""
    vocabulary = {"▁the": 0, "▁cat": 1, "s": 2, "0": 3, "▁": 4, "<unk>": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def test_a_space_before_a_word_belongs_to_its_token() -> None:
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=metaspace_tokenizer()))
    assert [texts[i] for i in (0, 1, 2)] == [" the", " cat", "s"]


def test_part_of_a_character_shows_its_vocabulary_entry() -> None:
    vocabulary = {"Ã": 0, "©": 1, "0": 2, "<unk>": 3}  # the two bytes of "é", as byte-level writes
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert (texts[0], texts[2]) == ("Ã", "0")


@pytest.mark.parametrize(
    ("text", "back", "places"),
    [
        ("1+2=3", "1+2=3", []),
        ("1x2=3", "1<unk>2=3", [1]),
        ("x1+2=3y", "<unk>1+2=3<unk>", [0, 6]),
        ("12", "", [0]),
        ("12", "123", [2]),
        ("a  bcde  fghi", "a bcde fghi", [2, 8]),
    ],
)
def test_the_places_where_a_text_comes_back_otherwise(
    text: str, back: str, places: list[int]
) -> None:
    assert differences(text, back) == places


@given(text=st.text(alphabet="ab ", max_size=200), back=st.text(alphabet="ab ", max_size=200))
def test_places_are_in_the_text_ascending_and_bounded(text: str, back: str) -> None:
    places = differences(text, back)
    assert bool(places) == (text != back)
    assert places == sorted(set(places))
    assert len(places) <= MAX_POSITIONS
    assert all(0 <= place <= len(text) for place in places)


def test_a_text_outside_the_vocabulary_is_told_with_its_places() -> None:
    ids, (warning,) = Tokenizing(symbol_tokenizer()).ids("response", "1+x2=zz;")
    assert ids.tolist().count(symbol_tokenizer().unk_token_id) == 3
    assert (warning.reason, warning.field) == ("unknown_text", "response")
    assert warning.positions == (2, 5)
    assert SPECIALS[0] in warning.message
    assert Tokenizing(symbol_tokenizer()).ids("response", "1+2=")[1] == []


def test_a_template_of_the_senders_own_is_refused() -> None:
    """It could run for ever."""
    tokenizing = Tokenizing(symbol_tokenizer())
    turns = [{"role": "user", "content": "1+2"}]
    assert tokenizing.conversation(turns, {"times": 2}) == "1+2;=="
    for name in ("chat_template", "tokenize", "conversation", "tools"):
        with pytest.raises(InvalidRequestError, match=f"chat_template_kwargs: {name}"):
            tokenizing.conversation(turns, {name: "{{ 1 }}"})
    with pytest.raises(InvalidRequestError, match="the chat template says: no tools here"):
        tokenizing.conversation([{"role": "tool", "content": "1"}], {})

"""The per-token report against a hand-made response."""

import dataclasses
import json
import math

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from teacher_server.http.analysis import Report, TokenTexts, build_report, report_to_json
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.errors import InvalidRequestError, NonFiniteError
from teacher_wire.records import DriftPolicy, DriftState, ScoreRows, Scores, Timing, Verdict
from tests.teacher.http.http_teacher import symbol_tokenizer

PROMPT_IDS = np.array([0, 10], np.int32)
RESPONSE_IDS = np.array([1, 2, 3], np.int32)
POLICY = DriftPolicy(metric=OverlapRatio(k=2, threshold=0.7), w_drop=0.5)
TEXTS = TokenTexts(symbol_tokenizer())


def hand_made_rows() -> ScoreRows:
    half, quarter = math.log(0.5), math.log(0.25)
    return ScoreRows(
        offset=0,
        topk_ids=np.array([[1, 4], [4, 5], [4, 3]], np.int32),
        topk_logprobs=np.array([[half, quarter]] * 3, np.float32),
        token_logprobs=np.array([half, -4.0, quarter], np.float32),
        candidate_logprobs=np.zeros((3, 2), np.float32),
        overlap_counts=np.array([2, 1, 0], np.uint8),
        bad_events=np.array([False, True, True]),
        entropies=np.array([1.0, 1.25, 1.5], np.float32),
        token_ranks=np.array([1, 9, 2], np.int32),
    )


def hand_made_scores(rows: ScoreRows) -> Scores:
    return Scores(
        rows=rows,
        drift=DriftState(num_tokens=3, num_bad_events=2, exhausted_at=3),
        verdict=Verdict.TRUNCATE,
        keep_tokens=3,
        timing=Timing(),
    )


def hand_made_report(rows: ScoreRows | None = None) -> Report:
    scores = hand_made_scores(hand_made_rows() if rows is None else rows)
    return build_report(PROMPT_IDS, RESPONSE_IDS, scores, POLICY, TEXTS)


def test_entry_t_holds_row_t() -> None:
    report = hand_made_report()
    assert [entry.token for entry in report.prompt] == ["0", "+"]
    assert [(t.position, t.token_id, t.token) for t in report.tokens] == [
        (0, 1, "1"),
        (1, 2, "2"),
        (2, 3, "3"),
    ]
    second = report.tokens[1]
    assert (second.logprob, second.rank, second.entropy) == (-4.0, 9, 1.25)
    assert [(a.token_id, a.token) for a in second.topk] == [(4, "4"), (5, "5")]
    assert second.topk[0].logprob == pytest.approx(math.log(0.5), rel=1e-6)  # float32


def test_a_bad_token_already_counts_against_itself() -> None:
    report = hand_made_report()
    assert [t.bad_event for t in report.tokens] == [False, True, True]
    assert [t.reliability for t in report.tokens] == [1.0, 0.5, 0.0]
    assert [t.overlap for t in report.tokens] == [1.0, 0.5, 0.0]
    assert (report.num_bad_events, report.exhausted_at) == (2, 3)
    assert (report.verdict, report.keep_tokens) == ("truncate", 3)


def test_the_mean_is_over_response_tokens() -> None:
    expected = (math.log(0.5) - 4.0 + math.log(0.25)) / 3
    assert hand_made_report().mean_logprob == pytest.approx(expected, rel=1e-6)  # float32


def test_what_was_not_asked_for_is_none_and_never_a_number() -> None:
    bare = dataclasses.replace(
        hand_made_rows(),
        candidate_logprobs=None,
        overlap_counts=None,
        bad_events=None,
        entropies=None,
        token_ranks=None,
    )
    scores = Scores(
        rows=bare, drift=None, verdict=Verdict.CONTINUE, keep_tokens=None, timing=Timing()
    )
    report = build_report(PROMPT_IDS, RESPONSE_IDS, scores, None, TokenTexts(None))
    for token in report.tokens:
        assert token.token is None
        assert token.rank is token.entropy is token.overlap is None
        assert token.bad_event is token.reliability is None
    assert report.num_bad_events is report.exhausted_at is report.keep_tokens is None


def test_overlap_without_a_policy_is_a_share_of_what_was_compared() -> None:
    rows = dataclasses.replace(hand_made_rows(), bad_events=None)
    report = build_report(PROMPT_IDS, RESPONSE_IDS, hand_made_scores(rows), None, TEXTS)
    assert [t.overlap for t in report.tokens] == [1.0, 0.5, 0.0]


def test_the_json_form_survives_a_strict_round_trip() -> None:
    content = report_to_json(hand_made_report())
    assert json.dumps(content) == json.dumps(dataclasses.asdict(hand_made_report()))
    assert json.loads(json.dumps(content, allow_nan=False))["tokens"][2]["reliability"] == 0.0


@pytest.mark.parametrize("name", ["topk_logprobs", "token_logprobs", "entropies"])
def test_a_number_that_is_not_finite_is_refused_by_name_and_position(name: str) -> None:
    rows = hand_made_rows()
    getattr(rows, name)[1] = -np.inf
    with pytest.raises(NonFiniteError, match=f"{name} is not finite at response token 1"):
        hand_made_report(rows)


def test_rows_of_another_response_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="do not cover a response of 3 tokens"):
        hand_made_report(dataclasses.replace(hand_made_rows(), offset=1))


def test_an_empty_response_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="0 tokens"):
        build_report(
            PROMPT_IDS, RESPONSE_IDS[:0], hand_made_scores(hand_made_rows()), POLICY, TEXTS
        )


def test_an_id_outside_the_vocabulary_has_no_text() -> None:
    assert TEXTS[9999] is None
    assert TEXTS[15] == "é"


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

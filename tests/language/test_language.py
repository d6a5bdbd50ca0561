"""The parts of `make demo-language` on tiny models; the demo itself is `make test-language`.

What reads or makes packages of the extra `language` is skipped where they are not installed.
Run: pytest tests/language
"""

from __future__ import annotations

import json
import math
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.demo import ROOT, DemoError
from examples.language import measuring, pruning, report, source, stages, tasks
from student_trainer import cli
from student_trainer.data import load_prompts
from student_trainer.recording.json_lines import METRICS_FILE
from student_trainer.recording.run_folder import checkpoint_to_resume
from student_trainer.records import Prompt
from student_trainer.settings.config import load_config
from tests.trainer.data.made_tokenizers import byte_level
from tests.trainer.learner.tiny_student import character_tokenizer
from tests.trainer.made_reports import step_report

END, NUM_LAYERS = 1, 5
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
BYTES = sorted(set(re.findall(".", "".join(map(chr, [*range(33, 127), *range(161, 173)])))))
TOKENS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", *BYTES, "Ġ", "Ċ", "ĠĠ", "ĊĊ", "12", "ab"]


def llama(*, seed: int = 0, layers: int = NUM_LAYERS, vocab: int = 48) -> LlamaForCausalLM:
    """Spread out enough that its distributions are far from uniform."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=END,
        pad_token_id=0,
        dtype=torch.float32,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A tiny model as llama.cpp would write it, its widest matrices in Q4_1, and what it is."""
    gguf = pytest.importorskip("gguf")
    model = llama(layers=2, vocab=len(TOKENS))
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["Ġ Ġ", "Ċ Ċ", "1 2", "a b"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(END)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(END)
    writer.add_chat_template(TEMPLATE)
    own = {theirs: ours for ours, theirs in source.NAMES_IN_LAYER.items()}
    outside = {theirs: ours for ours, theirs in source.NAMES.items()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in outside:
                writer.add_tensor(outside[name], weight.numpy())
                continue
            _, _, layer, kind = name.removesuffix(".weight").split(".", 3)
            ours = f"blk.{layer}.{own[kind]}.weight"
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            number = heads.get(kind.rpartition(".")[2])
            if number is not None:  # the two halves of a head in turns
                halves = weight.reshape(number, 2, -1, weight.shape[-1])
                writer.add_tensor(ours, halves.transpose(1, 2).reshape(weight.shape).numpy())
            elif "mlp" in kind:
                q4 = gguf.GGMLQuantizationType.Q4_1
                packed = gguf.quantize(weight.numpy(), q4)
                weight.copy_(torch.from_numpy(gguf.dequantize(packed, q4)))
                writer.add_tensor(ours, packed, raw_dtype=q4)
            else:
                writer.add_tensor(ours, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


@pytest.fixture(scope="module")
def converted(
    written: tuple[Path, LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    source.convert(written[0], folder)
    return folder


def test_a_converted_model_predicts_what_the_written_one_does(
    written: tuple[Path, LlamaForCausalLM], converted: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, written[1](ids).logits, atol=1e-5, rtol=0)
    assert model.dtype == torch.float32
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == END
    assert {path.suffix for path in converted.iterdir()} == {".json", ".safetensors", ".jinja"}


def test_a_converted_tokenizer_splits_digits_and_keeps_template_and_special_tokens(
    converted: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = tokenizer("ab 12\n\n1<|im_end|>", add_special_tokens=False)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    # GPT-2's rules alone would make one token of 12, and two of the newlines before a digit.
    assert pieces == ["ab", "Ġ", "1", "2", "ĊĊ", "1", "<|im_end|>"]
    assert (
        ids
        == Tokenizer.from_file(str(converted / "tokenizer.json"))
        .encode("ab 12\n\n1<|im_end|>", add_special_tokens=False)
        .ids
    )
    assert tokenizer.decode(ids) == "ab 12\n\n1<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab 12\n\n1"
    assert tokenizer.eos_token_id == END
    chat = [{"role": "user", "content": "ab"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "ab>"


def test_another_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_tokenizer_pre("qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DemoError, match="'qwen2'; only llama with 'smollm'"):
        source.convert(tmp_path / "other.gguf", tmp_path / "out")


def test_a_file_of_another_digest_is_refused_with_both(tmp_path: Path) -> None:
    (tmp_path / source.GGUF_NAME).write_bytes(b"weights")
    right = sha256(b"weights").hexdigest()
    source.check_digest(tmp_path / source.GGUF_NAME, right)
    with pytest.raises(DemoError, match=f"{right}, must be {source.GGUF_SHA256}; remove it"):
        source.fetch(tmp_path)


def test_the_layers_of_least_change_go_but_never_the_first_two_or_the_last() -> None:
    changes = [0.01, 0.02, 0.5, 0.1, 0.3, 0.05, 0.03]
    assert pruning.kept_layers(changes, 7) == [0, 1, 2, 3, 4, 5, 6]
    assert pruning.kept_layers(changes, 5) == [0, 1, 2, 4, 6]
    assert pruning.kept_layers(changes, 3) == [0, 1, 6]
    for impossible in (2, 8):
        with pytest.raises(DemoError, match=f"{impossible} of 7 layers .* must be 3 to 7"):
            pruning.kept_layers(changes, impossible)


def test_a_pruned_model_with_nothing_removed_is_the_model() -> None:
    model, ids = llama(), torch.arange(2, 30)[None]
    with torch.no_grad():
        same = pruning.pruned(model, range(NUM_LAYERS))(ids).logits
        assert torch.equal(same, model(ids).logits)


def test_a_layer_that_does_nothing_changes_nothing_and_is_not_missed() -> None:
    model, ids = llama(), torch.arange(2, 30)
    with torch.no_grad():
        for part in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            part.weight.zero_()
        changes = pruning.residual_changes(model, [ids, ids[:9]], skip=[4, 0])
        assert changes[2] == pytest.approx(0.0, abs=1e-12)
        assert min(changes[:2] + changes[3:]) > 1e-3
        kept = pruning.kept_layers(changes, 4)
        assert kept == [0, 1, 3, 4]
        student = pruning.pruned(model, kept)
        torch.testing.assert_close(student(ids[None]).logits, model(ids[None]).logits)
    assert student.config.num_hidden_layers == 4
    assert model.config.num_hidden_layers == NUM_LAYERS


def test_the_change_of_a_layer_is_of_the_positions_that_count() -> None:
    model, ids = llama(), torch.arange(2, 30)
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states
    cosine = torch.cosine_similarity(states[1][0, 5:], states[2][0, 5:], dim=-1)
    changes = pruning.residual_changes(model, [ids], skip=[5])
    assert changes[1] == pytest.approx(1.0 - float(cosine.mean()), abs=1e-5)


def answer(
    response: list[int], *, prompt: list[int] | None = None, **more: Any
) -> measuring.Response:
    fields = {"prompt_id": "p", "sample": 0, "ended": False, **more}
    return measuring.Response(prompt_ids=prompt or [5, 6, 7], response_ids=response, **fields)


def test_compared_positions_equal_the_definition_written_out() -> None:
    student, teacher = llama(seed=1, layers=3), llama(seed=2)
    temperature, response = 0.7, [9, 4, 30, 1]
    found = measuring.positions(student, teacher, answer(response), temperature=temperature)
    prefix = [5, 6, 7]
    for place, token in enumerate(response):
        with torch.no_grad():
            p, q = (
                torch.softmax(
                    model(torch.tensor([prefix])).logits[0, -1].double() / temperature, -1
                )
                for model in (student, teacher)
            )
        kl = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
        back = sum(float(b) * math.log(float(b) / float(a)) for a, b in zip(p, q, strict=True))
        assert float(found.reverse_kl[place]) == pytest.approx(kl, abs=1e-4)
        assert float(found.forward_kl[place]) == pytest.approx(back, abs=1e-4)
        assert float(found.teacher_logprob[place]) == pytest.approx(math.log(q[token]), abs=1e-4)
        both = set(p.topk(16).indices.tolist()) & set(q.topk(16).indices.tolist())
        assert float(found.overlap[place]) == pytest.approx(len(both) / 16)
        assert bool(found.same_first[place]) == (int(p.argmax()) == int(q.argmax()))
        prefix.append(token)


def test_a_model_against_itself_differs_in_nothing() -> None:
    model = llama()
    found = measuring.positions(model, model, answer([9, 4, 30]), temperature=1.0)
    assert found.reverse_kl.abs().max() == found.forward_kl.abs().max() == 0
    assert found.overlap.min() == found.same_first.min() == 1
    torch.testing.assert_close(found.student_entropy, found.teacher_entropy)


def test_sampled_answers_stop_at_the_end_token_and_repeat_by_seed() -> None:
    model, tokenizer = llama(), character_tokenizer()
    prompts = [
        Prompt(
            prompt_id=str(n), text="", token_ids=np.arange(2, 4 + n, dtype=np.int32), answer=None
        )
        for n in range(6)
    ]
    options: dict[str, Any] = {"num_samples": 3, "max_tokens": 12, "temperature": 1.5}
    first = measuring.sampled(model, tokenizer, prompts, seed=3, **options)
    assert first == measuring.sampled(model, tokenizer, prompts, seed=3, **options)
    assert first != measuring.sampled(model, tokenizer, prompts, seed=4, **options)
    assert [(r.prompt_id, r.sample) for r in first] == [
        (str(n), s) for n in range(6) for s in range(3)
    ]
    assert {r.ended for r in first} == {True, False}
    for response in first:
        assert response.prompt_ids == prompts[int(response.prompt_id)].token_ids.tolist()
        assert response.ended == (response.response_ids[-1] == END)
        assert END not in response.response_ids[:-1]
        assert response.ended or len(response.response_ids) == 12


def test_figures_are_means_over_tokens_and_over_responses() -> None:
    def made(*kl: float) -> measuring.Positions:
        values = torch.tensor(kl)
        return measuring.Positions(
            **dict.fromkeys(
                ("forward_kl", "teacher_logprob", "student_entropy", "teacher_entropy"), values
            ),
            reverse_kl=values,
            overlap=values / 4,
            same_first=(values > 2).float(),
        )

    loop = [7] * 40
    responses = [answer([9], ended=True), answer([8, 9, 3], prompt_id="q"), answer(loop)]
    found = measuring.figures(responses, [made(1.0), made(2.0, 3.0, 4.0), made(*[1.0] * 40)])
    assert found.reverse_kl == pytest.approx((1 + 9 + 40) / 44)
    assert found.same_first == pytest.approx(2 / 44)
    assert (found.num_responses, found.num_tokens) == (3, 44)
    assert found.end_rate == pytest.approx(1 / 3)
    assert found.length == pytest.approx(44 / 3)
    assert found.responses_by_position == [3, 2, 2] + [1] * 37
    assert found.overlap_by_position[:3] == [pytest.approx(1 / 3, abs=1e-4), 0.5, 0.625]
    assert found.loop_rate == pytest.approx((39 / 40) / 3)
    assert found.repeated_rate == pytest.approx(36 / 40 / 3)
    assert found.repeated_by_position == [0.0] * 4 + [1.0] * 36
    assert found.reverse_kl_error > 0


def test_repeated_runs_are_those_that_were_said_before() -> None:
    assert measuring.repeats(np.array([1, 2, 3], np.int32)).tolist() == [False] * 3
    ids = np.array([1, 2, 3, 4, 1, 2, 3, 4, 1, 9], np.int32)
    assert np.flatnonzero(measuring.repeats(ids)).tolist() == [7, 8]


def test_a_rate_is_compared_at_the_lengths_of_another_model() -> None:
    by_position, responses = [0.0, 0.2, 0.6], [4, 4, 1]
    assert measuring.at_positions_of([4, 4, 1], by_position, responses) == pytest.approx(1.4 / 9)
    assert measuring.at_positions_of([2, 1], by_position, responses) == pytest.approx(0.2 / 3)
    assert measuring.at_positions_of([1, 1, 1, 5], by_position, responses) == pytest.approx(0.8 / 3)


def test_instructions_are_prompts_and_no_part_has_anothers() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    texts: list[str] = []
    for part, least in {"train": 48, "tune": 16, "heldout": 16}.items():
        path = tasks.INSTRUCTIONS / f"{part}.jsonl"
        prompts = load_prompts(path, tokenizer, max_prompt_tokens=200)
        assert len(prompts) >= least
        assert [prompt.prompt_id for prompt in prompts] == [
            f"{part}-{number:02}" for number in range(1, len(prompts) + 1)
        ]
        texts += [prompt.text for prompt in prompts]
    assert len(set(texts)) == len(texts)


def test_tasks_are_the_same_each_time_and_no_part_has_anothers(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    questions = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        tasks.write(folder)
    for part, number in tasks.PARTS.items():
        text = (tmp_path / "a" / f"{part}.jsonl").read_text(encoding="utf-8")
        assert text == (tmp_path / "b" / f"{part}.jsonl").read_text(encoding="utf-8")
        rows = [row for row in map(json.loads, text.splitlines()) if tasks.is_task(row["id"])]
        assert len(rows) == number * len(tasks.TASKS)
        assert all(row["answer"] for row in rows)
        questions += [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) == len(questions)


def measured(**figures: float) -> dict[str, Any]:
    return {"figures": {"all": figures}, "texts": []}


def test_a_verdict_is_about_half_of_the_kl_and_about_nearness_to_the_teacher() -> None:
    teacher = measured(reverse_kl=0.0, teacher_logprob=-1.0, end_rate=0.4, repeated_alike=0.01)
    before = measured(reverse_kl=2.0, teacher_logprob=-4.0, end_rate=0.9, repeated_alike=0.05)
    good = measured(reverse_kl=1.0, teacher_logprob=-3.0, end_rate=0.2, repeated_alike=0.04)
    bad = measured(reverse_kl=1.01, teacher_logprob=-4.0, end_rate=0.9, repeated_alike=0.05)
    assert [v.holds for v in report.verdicts(teacher, before, good)] == [True] * 4
    assert [v.holds for v in report.verdicts(teacher, before, bad)] == [False] * 4


def test_pairs_are_drawn_by_seed_and_whatever_was_said_stays_in_its_cell() -> None:
    def said(word: str) -> dict[str, Any]:
        prompt = "<|im_start|>user\nWhat | is\nit?<|im_end|>\n<|im_start|>assistant\n"
        texts = [
            {"prompt_id": f"p{n}", "prompt": prompt, "response": f"{word}|\n# {n}", "ended": n % 2}
            for n in range(30)
        ]
        return {"texts": texts}

    text = report.pairs(said("c"), said("a"), said("b"))
    assert text == report.pairs(said("c"), said("a"), said("b"))
    drawn = re.findall(r"^\*\*p(\d+)\*\*: What \\\| is<br>it\?$", text, re.MULTILINE)
    assert len(set(drawn)) == report.NUM_PAIRS
    for number in drawn:
        assert f"| before | a\\|<br>\\# {number}" in text


def test_a_result_is_used_again_only_for_the_same_things(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "result.json"
    assert stages._made(path, {"seed": 1}) is None
    stages._write(path, {"seed": 1}, {"value": 2.5})
    assert stages._made(path, {"seed": 1}) == {"made_of": {"seed": 1}, "value": 2.5}
    assert stages._made(path, {"seed": 2}) is None


def test_a_try_that_was_cut_off_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    config_file = ROOT / "configs" / "trainer-language.toml"
    overrides = (f"run.out={tmp_path / 'run'}",)
    plan = stages.Plan(
        out=tmp_path,
        config_file=config_file,
        teacher_config=ROOT / "configs" / "teacher-language.toml",
        overrides=overrides,
        config=load_config(config_file, overrides),
        part="tune",
        num_prompts=1,
    )
    run = plan.config.run.out
    run.mkdir()
    values = step_report(step=1).values()
    (run / METRICS_FILE).write_text(json.dumps({"kind": "step", "step": 1, **values}) + "\n")
    _, *words = stages.trainer_command(plan, "127.0.0.1:1")
    asked = cli._parser().parse_args(words)
    found = checkpoint_to_resume(run, resume=asked.resume, overwrite=asked.overwrite)
    assert found is None

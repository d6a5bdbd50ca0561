"""`student-trainer train | doctor | eval | report | push | show-config | settings | check-loss`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

try:
    import teacher_wire
except ModuleNotFoundError:
    sys.exit("student-trainer: the distribution driftline-client is missing; install it again")

from student_trainer.errors import ConfigError
from student_trainer.process.failures import (
    EXIT_FAILED,
    EXIT_LASTING,
    exit_code,
    failure_line,
    keep_traceback,
    needs_traceback,
)
from student_trainer.process.ranks import Ranks, joined
from student_trainer.process.stopping import EXIT_TERMINATED, Stopped, StopRequest
from student_trainer.settings.config import TrainerConfig, load_config
from student_trainer.settings.reference import reference
from student_trainer.settings.warnings import warnings
from student_trainer.train_state import complete_checkpoints, step_of
from teacher_wire import tracing
from vllm_process.children import kill_engines
from vllm_process.cores import wait_briefly
from vllm_process.imports import uncollected

EXIT_INTERRUPTED = 130
TRAIN = (
    "Distil a student. SIGTERM gives up the step under way, writes a checkpoint of the last "
    "finished one and prints the command that goes on; a second SIGTERM ends the run at once."
)
REPORT = (
    "One run: report.html (one file, nothing else needed), report.png, summary.json and a table; "
    "several: compared.html in the folder of the first. A run that is still being written has a "
    "report of what there is."
)
EVAL = (
    "Greedy accuracy, avg@k and pass@k by the answers of the held-out problems; held-out "
    "divergences by the teacher. The result is JSON."
)
DOCTOR = (
    "Looks at machine, files, certificates and teachers as `train` will, and loads no model: what "
    "is seen, what it may be, how to mend it. Exit 0, or 2 where a run would not start."
)
EXIT_CODES = f"""\
exit codes:
  0    done
  {EXIT_FAILED}    failed: one line on stderr says why, and which file has the traceback
  {EXIT_LASTING}    starting it again will not help: the command line, a setting, a file, data, or a
       teacher that does not fit; one line on stderr says which
  {EXIT_INTERRUPTED}  interrupted (Ctrl-C)
  {EXIT_TERMINATED}  train: ended by SIGTERM, can be resumed
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; what fails is one line on stderr and an exit code of EXIT_CODES."""
    arguments = _parser().parse_args(argv)
    arguments.command = sys.orig_argv if argv is None else ["student-trainer", *argv]
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader, `head` for one, has seen enough; nothing is left to be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - the edge: nothing above tells the user
        return _failed(error, arguments.out)
    return code


def _failed(error: Exception, folder: Path | None) -> int:
    """Tells the user; the traceback goes where the line says."""
    line = failure_line(error)
    if needs_traceback(error):
        kept = keep_traceback(error, folder)
        line += f" (traceback: {kept or 'nowhere to write it to'})"
    print(line, file=sys.stderr)
    return exit_code(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="student-trainer",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = teacher_wire.version_line(parser.prog)
    parser.add_argument("--version", action="version", version=version)
    parser.set_defaults(out=None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="distil a student", description=TRAIN)
    _config_arguments(train)
    _start_arguments(train)
    train.set_defaults(run=_train)

    doctor = commands.add_parser(
        "doctor", help="what would keep a run from starting", description=DOCTOR
    )
    _doctor_arguments(doctor)
    doctor.set_defaults(run=_doctor)

    evaluate = commands.add_parser(
        "eval", help="what any checkpoint makes of the held-out problems", description=EVAL
    )
    _eval_arguments(evaluate)
    evaluate.set_defaults(run=_eval)

    report = commands.add_parser(
        "report", help="a page of what runs showed, and of one run a table", description=REPORT
    )
    report.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="the run's folder")
    report.add_argument(
        "--teacher-eval", type=Path, help="result of `eval --json` for the teacher, to compare with"
    )
    report.add_argument("--page", type=Path, metavar="FILE", help="where the page is written")
    report.add_argument("--pngs", type=Path, metavar="DIR", help="a PNG file of every picture")
    report.set_defaults(run=_report)

    push = commands.add_parser("push", help="upload the trained student to a hub")
    push.add_argument("folder", type=Path, help="the run's folder")
    push.add_argument("--repo", required=True, metavar="ORG/NAME", help="made where there is none")
    push.add_argument("--private", action="store_true", help="if it is made")
    push.set_defaults(run=_push)

    show = commands.add_parser("show-config", help="the resolved configuration as JSON")
    _config_arguments(show)
    show.set_defaults(run=_show_config)

    check = commands.add_parser("check-loss", help="whether a loss of your own obeys the laws")
    check.add_argument("path", help="package.module:function")
    check.add_argument("--options", type=json.loads, default={}, help="[loss.options] as JSON")
    check.set_defaults(run=_check_loss)

    settings = commands.add_parser("settings", help="what can be set: range, default, effect")
    settings.add_argument("section", nargs="?", default="", help="such as budget or rollout.top_p")
    settings.set_defaults(run=_settings)
    return parser


def _doctor_arguments(doctor: argparse.ArgumentParser) -> None:
    _config_arguments(doctor)
    doctor.add_argument("--json", action="store_true", help="findings as JSON")
    doctor.add_argument(
        "--teacher-http", default="", metavar="URL", help="HTTP side of a teacher: its clock"
    )


def _eval_arguments(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("config_path", nargs="?", type=Path, metavar="CONFIG", help="TOML file")
    _config_arguments(evaluate, required=False)
    evaluate.add_argument(
        "--checkpoint",
        "--model",
        metavar="DIR",
        help="folder or name of a checkpoint; default: the configured student",
    )
    evaluate.add_argument(
        "--teacher",
        choices=("auto", "required", "none"),
        default="auto",
        help="ask it for held-out divergences: if it answers within 5 s (default), in any case, no",
    )
    evaluate.add_argument("--json", type=Path, help="write the result here instead")


def _start_arguments(train: argparse.ArgumentParser) -> None:
    """How a run begins where one was before."""
    start = train.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        type=_auto,
        metavar="auto",
        help="go on from the run's last checkpoint; `auto`: begin where there is none",
    )
    start.add_argument(
        "--overwrite", action="store_true", help="delete the earlier run in run.out and begin again"
    )
    train.add_argument(
        "--accept-changes",
        action="append",
        default=[],
        metavar="KEY",
        help="setting, or group of settings, that may change on a resume although it changes what "
        "is learnt; may be repeated",
    )


def _auto(text: str) -> str:
    if text != "auto":
        raise argparse.ArgumentTypeError(f"takes nothing or `auto`, not {text!r}")
    return text


def _config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--config", type=Path, required=required, help="TOML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one setting; may be repeated",
    )


def _config(arguments: argparse.Namespace) -> TrainerConfig:
    config = load_config(arguments.config, arguments.set)
    arguments.out = config.run.out
    return config


def _train(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    for warning in warnings(config):
        print(f"warning: {warning}", file=sys.stderr)
    if config.run.otlp_endpoint:
        try:
            tracing.export_to(config.run.otlp_endpoint, "student-trainer")
        except ImportError as error:
            raise ConfigError(f"run.otlp_endpoint needs the extra `otel`: {error}") from error
    stop = StopRequest()
    with stop.on_sigterm(lambda: _last_words(config, arguments)):
        try:
            with joined() as ranks:
                _train_until_stopped(config, arguments, stop, ranks)
        except Stopped:
            stop.say_last_words()
            return EXIT_TERMINATED
        finally:
            kill_engines()
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from preflight.findings import Finding, problem
    from preflight.showing import told

    found: Iterable[Finding]
    try:
        config = load_config(arguments.config, arguments.set)
    except ConfigError as error:
        first, *more = str(error).splitlines()
        found = [problem("settings", f"{first} {line.strip()}") for line in more]
        found = found or [problem("settings", first)]
    else:
        wait_briefly()
        from student_trainer.assembly.doctor import findings

        found = findings(config, arguments.teacher_http, before_loading=_quiet_libraries)
    version = teacher_wire.__version__
    bad = told(found, in_json=arguments.json, program="student-trainer", version=version)
    return EXIT_LASTING if bad else 0


def _train_until_stopped(
    config: TrainerConfig, arguments: argparse.Namespace, stop: StopRequest, ranks: Ranks
) -> None:
    with stop.may_give_up(), uncollected():
        wait_briefly()
        _quiet_libraries()
        from student_trainer.assembly.run import assembled
        from student_trainer.train import train

    with assembled(
        config,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        accept_changes=arguments.accept_changes,
        stop=stop,
        ranks=ranks,
    ) as run:
        try:
            train(run)
        except Stopped:
            run.give_up()
            raise
        run.finish()


def _last_words(config: TrainerConfig, arguments: argparse.Namespace) -> str:
    """How far a run that SIGTERM ended is saved, and the command that goes on."""
    saved = complete_checkpoints(config.run.checkpoints)
    words = list(arguments.command)
    if saved and not arguments.resume:
        # A prefix of the flag is the flag.
        words = [
            word for word in words if not (word[:4] == "--ov" and "--overwrite".startswith(word))
        ]
        words.append("--resume")
    command = shlex.join(words)
    if not saved:
        return f"SIGTERM: no finished step is saved; the run begins again with\n  {command}"
    done, planned = step_of(saved[-1]), config.run.steps
    return f"SIGTERM: {done} of {planned} steps are saved in {saved[-1]}; go on with\n  {command}"


def _quiet_libraries() -> None:
    """One set of progress bars is enough: ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _eval(arguments: argparse.Namespace) -> int:
    if (arguments.config is None) == (arguments.config_path is None):
        raise ConfigError("eval needs one configuration: `student-trainer eval CONFIG`")
    arguments.config = arguments.config or arguments.config_path
    config = _config(arguments)
    _quiet_libraries()
    from student_trainer.assembly.checkpoint_eval import evaluate_checkpoint

    model = arguments.checkpoint or config.student.model
    result = evaluate_checkpoint(config, model, teacher=arguments.teacher)
    text = json.dumps(result, indent=2)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    if (absent := result["without_teacher"]) and arguments.teacher != "none":
        print(f"warning: no held-out divergences without a teacher: {absent}", file=sys.stderr)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from student_trainer.report_command import report

    return report(arguments.folders, arguments.teacher_eval, arguments.page, arguments.pngs)


def _push(arguments: argparse.Namespace) -> int:
    from student_trainer.hub import push

    print(push(arguments.folder, arguments.repo, private=arguments.private))
    return 0


def _show_config(arguments: argparse.Namespace) -> int:
    print(_config(arguments).model_dump_json(indent=2))
    return 0


def _check_loss(arguments: argparse.Namespace) -> int:
    if not isinstance(arguments.options, dict):
        raise ConfigError(f"--options must be a JSON object, got {arguments.options!r}")
    from student_trainer.assembly.own_loss import describe

    print(describe(arguments.path, arguments.options))
    return 0


def _settings(arguments: argparse.Namespace) -> int:
    print(reference(TrainerConfig, arguments.section), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

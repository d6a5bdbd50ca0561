"""Uploads a trained student. Which hub, and who one is there, is huggingface_hub's own affair:
HF_ENDPOINT, HF_TOKEN, `hf auth login`."""

from __future__ import annotations

from pathlib import Path

from student_trainer.errors import HubError, one_line
from student_trainer.recording.run_folder import STUDENT

REMEDY = "see HF_TOKEN, `hf auth login`, HF_ENDPOINT; what was uploaded already is not sent again"


def push(run: Path, repo: str, *, private: bool = False) -> str:
    """Puts the student of a run, with its model card, into a repository, which is made where there
    is none; returns where it can be seen.

    Raises HubError when there is no student, or the hub refuses or is not reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    student = run / STUDENT
    if not (student / "config.json").is_file():
        raise HubError(f"{student}: no trained student; is {run} the folder of a finished run?")
    api = HfApi()
    try:
        # None leaves it to the organisation what its repositories are.
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        done = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=student,
            commit_message=f"Student of the run {run.resolve().name}",
        )
    except HFValidationError as error:
        raise HubError(f"--repo {repo}: must be ORG/NAME: {error}") from None
    # httpx's errors and the hub's own, an unreadable file, a missing token.
    except Exception as error:
        reason = one_line(error)[:300]
        raise HubError(f"{student} was not pushed to {repo}: {reason}; {REMEDY}") from error
    return str(done.repo_url)

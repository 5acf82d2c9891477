"""What becomes of inputs that cannot run: each fails alone, with its code."""

from __future__ import annotations

from pathlib import Path

import msgspec
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from medley.db.inputs import Assigned
from medley.spec.errors import ErrorCode
from medley.spec.ids import uuid7
from medley.spec.jobs import JobState
from medley.spec.sampling import SamplingParams
from medley.store import Store
from medley_worker.shell.adapter_folders import AdapterFolders
from medley_worker.shell.held import Phase
from medley_worker.shell.intake import Preparation
from medley_worker.shell.text import TextCodec


def folders_of(store: Path) -> AdapterFolders:
    return AdapterFolders(Store.open(str(store)), None, lambda _: None)


def make_job(
    prompt: str, *, is_quarantined: bool = False, is_templated: bool = False, is_cancelled: bool = False
) -> Assigned:
    revision = uuid7() if is_quarantined else None
    return Assigned(
        job=uuid7(),
        attempt=1,
        tenant=uuid7(),
        revision=revision,
        digest=None,
        prompt=prompt,
        prompt_token_ids=None,
        sampling=SamplingParams(),
        checkpoint=None,
        priority=1,
        step_limit=None,
        is_quarantined=is_quarantined,
        is_templated=is_templated,
        is_cancelled=is_cancelled,
    )


def test_a_prompt_that_the_tokenizer_refuses_fails_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"known": 0}, unk_token="<unk>"))  # its unk is in no vocabulary
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    jobs = [make_job("known"), make_job("known strange"), make_job("known known")]
    held, failures = Preparation(TextCodec(tokenizer), folders_of(tmp_path), lambda: None).prepare(jobs)
    assert [h.phase for h in held] == [Phase.WAITING, Phase.ENDING, Phase.WAITING]
    assert [h.item and h.item.prompt_token_ids for h in held] == [(0,), None, (0, 0)]
    (failure,) = failures
    assert failure.job == jobs[1].job
    assert "strange" not in msgspec.json.encode(failure).decode()


def test_a_prompt_that_holds_its_special_tokens_gets_no_others(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"known": 0, "<s>": 1}, unk_token="known"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    jobs = [make_job("known"), make_job("<s>known", is_templated=True), make_job("known known")]
    held, _ = Preparation(TextCodec(tokenizer), folders_of(tmp_path), lambda: None).prepare(jobs)
    assert [h.item and h.item.prompt_token_ids for h in held] == [(1, 0), (1, 0), (1, 0, 0)]


def test_a_job_of_a_quarantined_adapter_never_reaches_the_engine(tmp_path: Path) -> None:
    codec = TextCodec(Tokenizer(models.WordLevel({"known": 0}, unk_token="known")))
    held, failures = Preparation(codec, folders_of(tmp_path), lambda: None).prepare(
        [make_job("known", is_quarantined=True)]
    )
    assert [h.phase for h in held] == [Phase.ENDING]
    assert [f.error and f.error.code for f in failures] == [ErrorCode.ADAPTER_QUARANTINED]


def test_a_job_of_a_cancelled_batch_ends_as_cancelled_without_being_read(tmp_path: Path) -> None:
    codec = TextCodec(Tokenizer(models.WordLevel({"known": 0}, unk_token="known")))
    jobs = [make_job("known", is_cancelled=True), make_job("known")]
    held, ends = Preparation(codec, folders_of(tmp_path), lambda: None).prepare(jobs)
    assert {h.key.job: h.phase for h in held} == {jobs[0].job: Phase.ENDING, jobs[1].job: Phase.WAITING}
    assert [(end.job, end.state, end.error) for end in ends] == [(jobs[0].job, JobState.CANCELLED, None)]


def test_a_prompt_that_is_too_long_has_used_no_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"known": 0}, unk_token="known"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    preparation = Preparation(TextCodec(tokenizer), folders_of(tmp_path), lambda: 4)
    _, (failure,) = preparation.prepare([make_job("known " * 4)])
    assert (failure.error and failure.error.code, failure.prompt_tokens) == (ErrorCode.PROMPT_TOO_LONG, 0)

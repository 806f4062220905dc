"""Two ranks that are stopped, killed and resumed, as one is in ``test_resume``: DDP with gloo."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lynx import checkpoint, cli
from lynx.train import checkpoints, recipe, run, trainer
from lynx.train.log import read_log
from tests.lynx import processes
from tests.lynx.small import write_records
from tests.lynx.train.test_resume import STEPS, before, changes_for, check_same, consumed, go

ROOT = Path(__file__).parents[3]
PACKS = {"token_budget": 28, "tokens_per_step": 56}  # a sample a pack


def go_rank(rank, changes, kill=None):
    """``go`` in one of the ranks; ``kill`` begins with the rank that it happens to."""
    go(changes, kill[1:] if kill is not None and kill[0] == rank else None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The output folder of a run of two ranks that nothing happens to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    processes.ranks(2, output.parent, go_rank, changes_for(data, output, **PACKS))
    return output


def newest_step(output):
    newest = checkpoints.latest(output / "checkpoints" / "train")
    return 0 if newest is None else checkpoints.step_of(newest)


def test_ranks_with_and_without_images_take_their_steps_together(whole):
    processor = checkpoint.load(whole)[1]
    texts = [[processor.tokenizer.decode(tokens) for tokens, _ in packs] for packs in consumed(whole).values()]
    assert len(texts) == STEPS
    assert any(("which" in first) != ("which" in second) for first, second in texts)
    begins = processor.tokenizer.bos_token_id  # every sample does
    samples = sum(tokens.count(begins) for packs in consumed(whole).values() for tokens, _ in packs)
    assert read_log(whole / "log.jsonl")[-2]["samples/train"] == samples, "those of all ranks"


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_at_one_rank_stops_all_at_one_step(rank, data, whole, tmp_path):
    changes = changes_for(data, tmp_path / "out", **PACKS)
    assert processes.exit_codes(2, tmp_path, go_rank, changes, (rank, "step", 2, signal.SIGTERM)) == [0, 0]
    newest = checkpoints.latest(tmp_path / "out" / "checkpoints" / "train")
    assert checkpoints.step_of(newest) == 3, "after the step that was running, not the next regular one"
    assert {"0-data.pt", "1-data.pt", "rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in newest.iterdir()}
    assert not (tmp_path / "out" / "config.json").exists(), "an unfinished run has no model"
    with pytest.raises(ValueError, match=r"was written by 2 ranks, this run has 1.*go on with 2 ranks"):
        run.run(recipe.load("tiny", changes))
    processes.ranks(2, tmp_path, go_rank, changes)
    check_same(tmp_path / "out", whole)


@pytest.mark.parametrize(("rank", "number"), [(0, 9), (1, 1)])
def test_a_rank_that_is_killed_while_saving_takes_no_checkpoint_along(rank, number, data, whole, tmp_path):
    """The other rank ends too, and does not wait for ever."""
    changes = changes_for(data, tmp_path / "out", **PACKS)
    processes.exit_codes(2, tmp_path, go_rank, changes, (1 - rank, "step", 3, signal.SIGKILL))
    assert newest_step(tmp_path / "out") == 2
    codes = processes.exit_codes(2, tmp_path, go_rank, changes, (rank, "write", number, signal.SIGKILL))
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] not in (0, None)
    assert newest_step(tmp_path / "out") == 2
    processes.ranks(2, tmp_path, go_rank, changes)
    check_same(tmp_path / "out", whole)


def command_rank(rank, arguments):
    """The command in one of the ranks, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(arguments) == 0
    return printed.getvalue()


def test_torchrun_passes_sigterm_on_and_goes_on(data, whole, tmp_path):
    """Nothing that is said is said by every rank, nor are there warnings that a user cannot mend."""
    changes = changes_for(data, tmp_path / "out", **PACKS)
    arguments = ["train", "tiny", *(f"{key}={value}" for key, value in changes.items())]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*launcher, "tests.lynx.train.test_resume_ranks", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode != 0, "torchrun's own, after a signal"
    assert done.stderr.count("stopped by SIGTERM in stage train; the same command goes on") == 1
    assert done.stderr.count("stage train trains") == 1
    assert "Warning" not in done.stderr
    assert done.stdout == ""
    stopped_at = newest_step(tmp_path / "out")
    assert 2 < stopped_at < STEPS
    assert read_log(tmp_path / "out" / "log.jsonl")[-1]["step"] == stopped_at
    assert processes.ranks(2, tmp_path, command_rank, arguments) == [f"{tmp_path / 'out'}\n", ""]
    for path in whole.glob("consumed-*"):  # this run did not write down what it consumed
        (tmp_path / "out" / path.name).write_text(path.read_text())
    check_same(tmp_path / "out", whole)


def _signal_torchrun_in_the_third_step() -> None:
    left = iter(range(2, -1, -1))

    def happens(*_, **__):
        if next(left, -1) == 0 and os.environ["RANK"] == "1":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(1)  # the other rank waits for this one's gradients

    before(trainer.LynxTrainer, "training_step", happens)


if __name__ == "__main__":  # one of torchrun's ranks
    _signal_torchrun_in_the_third_step()
    sys.exit(cli.main())

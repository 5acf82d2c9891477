"""`medley up`: everything on this machine, in the foreground."""

from __future__ import annotations

from pathlib import Path

import click

from medley.config import DEFAULT_DATA_DIR
from medley.local.binaries import EmbeddedServersUnavailable
from medley.local.datadir import DataDirInUse
from medley.local.deployment import UpOptions, run
from medley.local.gpus import TooFewGpus
from medley.local.lines import LineLog
from medley.local.supervisor import ChildFailed, Stopped

DEMO_MODEL = Path(__file__).resolve().parents[1] / "demo" / "assets" / "model"


@click.command()
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Workers to start, each on a GPU of its own.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="A Hugging Face folder: the base model.  [default: the demo's]",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DATA_DIR,
    show_default=True,
    help="Where all state is kept.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address the API listens on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8700, show_default=True, help="Its port; 0 takes any.")
@click.option("--device", default=None, help="cpu or cuda.  [default: MEDLEY_DEVICE, else cpu]")
@click.option("--dtype", default=None, help="float32, float16 or bfloat16.  [default: MEDLEY_DTYPE, else float32]")
@click.option("--max-num-seqs", type=click.IntRange(1), default=None, help="Rows a worker decodes together.")
@click.option(
    "--tensor-parallel",
    type=click.IntRange(1),
    default=None,
    help="GPUs that share one worker's model, each worker's its own.  [default: MEDLEY_TENSOR_PARALLEL, else 1]",
)
@click.option("--json", "as_json", is_flag=True, help="The log as JSON, an object a line.")
def up(
    workers: int,
    model: Path | None,
    data_dir: Path,
    host: str,
    port: int,
    device: str | None,
    dtype: str | None,
    max_num_seqs: int | None,
    tensor_parallel: int | None,
    as_json: bool,
) -> None:
    """Run PostgreSQL, Redis, the API, the dispatcher, the task worker and N workers until Ctrl-C.

    All state lies in the data directory; the same command on it goes on where it was.
    """
    folder = (model or DEMO_MODEL).absolute()
    if not (folder / "config.json").is_file():
        raise click.BadParameter(f"{folder} holds no config.json", param_hint="--model")
    given = {
        "MEDLEY_DEVICE": device,
        "MEDLEY_DTYPE": dtype,
        "MEDLEY_MAX_NUM_SEQS": max_num_seqs,
        "MEDLEY_TENSOR_PARALLEL": tensor_parallel,
    }
    options = UpOptions(
        data_dir=data_dir,
        model=str(folder),
        workers=workers,
        host=host,
        port=port,
        environ={key: str(value) for key, value in given.items() if value is not None},
    )
    try:
        run(options, LineLog(as_json=as_json))
    except Stopped:
        pass  # asked to stop before it was ready
    except (DataDirInUse, EmbeddedServersUnavailable, ChildFailed, TooFewGpus, OSError) as error:
        raise click.ClickException(str(error)) from error

"""`medley simulate`: the dispatcher's policy on a trace, before anybody pays for GPUs."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from medley.dispatcher.simulation import trace_files
from medley.dispatcher.simulation.report import as_text
from medley.dispatcher.simulation.report import simulate as run
from medley.dispatcher.simulation.traces import TRACES, Mix, Trace
from medley.dispatcher.simulation.workers import Shape
from medley.dispatcher.step_time import H200_7B, StepTime

DEFAULTS = {  # seconds, and jobs a second at the peak
    "day": (7_200.0, 150.0),
    "ramp": (1_800.0, 200.0),
    "bursts": (1_200.0, 100.0),
    "bulk": (600.0, 60.0),
    "contention": (300.0, 60.0),
}


def _weights(values: tuple[str, ...]) -> dict[int, float]:
    found = {}
    for value in values:
        number, _, weight = value.partition("=")
        try:
            found[int(number)] = float(weight)
        except ValueError:
            raise click.BadParameter(f"got {value!r}, wanted TENANT=WEIGHT, both numbers") from None
        if found[int(number)] <= 0:
            raise click.BadParameter(f"got {value!r}, wanted a weight above 0")
    return found


def _trace(source: str, seed: int, duration_s: float | None, peak: float | None, mix: Mix) -> Trace:
    if source in TRACES:
        usual_s, usual_peak = DEFAULTS[source]
        return TRACES[source](seed, duration_s or usual_s, peak or usual_peak, mix)
    if not Path(source).is_file():
        raise click.BadParameter(f"got {source!r}, wanted {', '.join(TRACES)} or a file of JSON lines")
    try:
        return trace_files.read(Path(source))
    except trace_files.TraceRefused as error:
        raise click.ClickException(str(error)) from error


def _step_time(path: Path | None) -> StepTime:
    if path is None:
        return H200_7B
    try:
        return msgspec.json.decode(path.read_bytes(), type=StepTime)
    except msgspec.MsgspecError as error:
        raise click.BadParameter(f"{path}: {error}") from error


@click.command()
@click.argument("trace", default="day")
@click.option(
    "--workers", default=64, show_default=True, type=click.IntRange(1), help="Virtual workers that there are."
)
@click.option("--rows", default=64, show_default=True, type=click.IntRange(1), help="Rows of a worker (max_num_seqs).")
@click.option("--adapter-slots", default=256, show_default=True, type=click.IntRange(1), help="Adapters it can hold.")
@click.option("--duration-s", type=click.FloatRange(1), help="Length of a made trace.")
@click.option("--peak", type=click.FloatRange(0, min_open=True), help="Jobs a second at a made trace's peak.")
@click.option("--tenants", default=20, show_default=True, type=click.IntRange(1), help="Tenants of a made trace.")
@click.option("--adapters", default=200, show_default=True, type=click.IntRange(1), help="Adapters of a made trace.")
@click.option("--zipf", default=1.2, show_default=True, help="Their popularity: the k-th has k to the minus this.")
@click.option("--prompt-tokens", default=200, show_default=True, type=click.IntRange(1), help="Mean of a made trace.")
@click.option("--output-tokens", default=500, show_default=True, type=click.IntRange(1), help="Mean of a made trace.")
@click.option("--seed", default=1, show_default=True, help="Of a made trace.")
@click.option("--weight", "weights", multiple=True, metavar="TENANT=WEIGHT", help="By the tenant's number.")
@click.option("--wake-s", default=3.0, show_default=True, type=click.FloatRange(0), help="Time that a wake takes.")
@click.option("--turn-s", default=0.1, show_default=True, type=click.FloatRange(0.01), help="Least time between plans.")
@click.option("--step-time", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Its terms, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the fleet and its load.")
@click.option("--save-trace", type=click.Path(dir_okay=False, path_type=Path), help="Write the trace as JSON lines.")
def simulate(
    trace: str,
    workers: int,
    rows: int,
    adapter_slots: int,
    duration_s: float | None,
    peak: float | None,
    tenants: int,
    adapters: int,
    zipf: float,
    prompt_tokens: int,
    output_tokens: int,
    seed: int,
    weights: tuple[str, ...],
    wake_s: float,
    turn_s: float,
    step_time: Path | None,
    as_json: bool,
    plot: Path | None,
    save_trace: Path | None,
) -> None:
    """Replay TRACE on virtual workers: day, ramp, bursts, bulk, contention, or a file of JSON lines.

    The policy is the dispatcher's own; a virtual worker's speed is the step-time model (by default that of a 7B model
    on an H200). Beside it stands an oracle that knows all arrivals and wakes workers at once and for nothing.
    """
    mix = Mix(
        num_tenants=tenants,
        num_adapters=adapters,
        zipf=zipf,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
    replayed = _trace(trace, seed, duration_s, peak, mix)
    if save_trace is not None:
        trace_files.write(replayed, save_trace)
    shape = Shape(max_num_seqs=rows, adapter_slots=adapter_slots, step_time=_step_time(step_time), wake_s=wake_s)
    report, series = run(replayed, shape, workers, weights=_weights(weights), turn_s=turn_s)
    if plot is not None:
        from medley.dispatcher.simulation.plots import draw

        draw(report, series, plot)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        for line in as_text(report):
            click.echo(line)

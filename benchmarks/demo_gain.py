"""Does fine-tuning help on a demo building of a style never seen? Strategies, seeds and supervision side by side, with intervals.

    python benchmarks/demo_gain.py                                        # a, b, c on laser and sparse points, then b on each alone; 3 seeds each
    python benchmarks/demo_gain.py --strategies b --supervision dense --seeds 0 1 2
    python benchmarks/demo_gain.py --set epochs=20 model=path/to/weights  # other fields of TrainConfig

Runs that are finished are read, not repeated: every run is a folder under --output. Nothing is asserted.
"""
import argparse
import json
import time
from pathlib import Path

from vggt_lora.core import project_root
from vggt_lora.evaluation.statistics import effects, in_words
from vggt_lora.train import NAMES, TrainConfig, train


def results_of(config: TrainConfig) -> dict:
    """Return the results of a run, which is made where it is absent; `seconds` is the time it took, demo scenes included if they had to be made."""
    folder = Path(config.output)
    stated = folder / "seconds.json"
    if not stated.is_file():
        started = time.monotonic()
        train(config)
        stated.write_text(json.dumps(round(time.monotonic() - started, 1)))
    return json.loads((folder / "results.json").read_text()) | {"seconds": json.loads(stated.read_text())}


def fields(pairs: list[str]) -> dict:
    """Return NAME=VALUE pairs as fields of TrainConfig, of the fields' types."""
    default, found = TrainConfig(), {}
    for name, value in (pair.split("=", 1) for pair in pairs):
        kind = type(getattr(default, name))
        found[name] = value == "True" if kind is bool else kind(value)
    return found


def main() -> None:
    """Make the runs and print a line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["a", "b", "c"])
    parser.add_argument("--supervision", nargs="+", default=["laser+sparse", "laser", "sparse"], help="the first for all strategies, the others for b alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--output", type=Path, default=project_root() / "outputs" / "demo_gain")
    args = parser.parse_args()
    plan = [(s, args.supervision[0]) for s in args.strategies] + [("b", way) for way in args.supervision[1:]]
    for strategy, supervision in plan:
        runs, seconds, losses = [], [], []
        for seed in args.seeds:
            name = f"{strategy}-{supervision}-{seed}" + "".join(f"-{pair.replace('/', '_')}" for pair in args.set)
            found = results_of(TrainConfig(strategy=strategy, supervision=supervision, seed=seed, output=str(args.output / name), **fields(args.set)))
            runs.append(found["frames"])
            seconds.append(found["seconds"])
            losses.append(found["held_out_loss"])
        print(f"\nstrategy {strategy}, supervision {supervision}, seeds {args.seeds}, truth {found['protocol']['truth']}; "
              f"{min(seconds):.0f} to {max(seconds):.0f} s a run")
        print("  held-out loss " + ", ".join(f"{loss['before']:.3f} -> {loss['after']:.3f}" for loss in losses))
        for effect in effects(runs, tuple(NAMES)):
            print("  " + in_words(effect, NAMES[effect.metric]), flush=True)


if __name__ == "__main__":
    main()

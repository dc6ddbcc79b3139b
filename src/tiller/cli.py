"""The command line: one short function per command. `--help` imports neither torch nor diffusers.

Exit codes: 0 done; 1 a fault of tiller itself, with its traceback; 2 something the user can cure, said in one line;
130 interrupted (Ctrl-C); 143 terminated (SIGTERM). A command that saves before it leaves does so with the same codes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from tiller.commands import quiet
from tiller.types import ConfigError, RewardTimeout, TillerError

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143
LAST_WAIT = 5.0  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parse(sys.argv[1:] if argv is None else list(argv))
    quiet.settle()
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return arguments.command(arguments) or 0
    except TillerError as error:
        if isinstance(error, RewardTimeout):
            _leave_anyway(USER_ERROR)
        if arguments.debug:
            raise
        text = str(error)
        print(text if text.startswith("config error:") else f"error: {text}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave_anyway(code: int) -> None:
    """Python waits for threads when it ends; those of a hanging reward get this long, unless they are daemons."""
    sys.stdout.flush()
    last = threading.Timer(LAST_WAIT, os._exit, (code,))
    last.daemon = True
    last.start()


def _terminate(number: int, frame: object) -> NoReturn:
    sys.exit(TERMINATED)


def _train(arguments: argparse.Namespace) -> int | None:
    from tiller import config
    from tiller.recipe import Recipe

    if arguments.dry_run or arguments.calibrate:
        planned = config.load(Recipe, arguments.recipe, arguments.overrides, check=False)
        from tiller.commands import dry_run

        return dry_run.run(planned, name=Path(arguments.recipe).stem, calibrate=arguments.calibrate)
    recipe = config.load(Recipe, arguments.recipe, arguments.overrides)
    from tiller.commands import train

    return train.run(recipe, name=Path(arguments.recipe).stem, resume=arguments.resume)


def _demo(arguments: argparse.Namespace) -> int | None:
    from tiller.commands import demo

    return demo.run(overrides=arguments.overrides, output=arguments.output)


def _sample(arguments: argparse.Namespace) -> int | None:
    from tiller import config, prompts

    sampling = config.parse_pairs(arguments.overrides)
    if arguments.prompt and arguments.prompts:
        raise ConfigError("give --prompt or --prompts, not both.")
    wanted = prompts.load(arguments.prompts or arguments.prompt or "animals")
    from tiller.commands import sample

    return sample.run(
        arguments.model,
        wanted,
        adapter=arguments.adapter,
        per_prompt=arguments.per_prompt,
        seed=arguments.seed,
        output=arguments.output,
        sampling=sampling,
    )


def _evaluate(arguments: argparse.Namespace) -> int | None:
    from tiller.commands import evaluate

    return evaluate.run(Path(arguments.run), overrides=arguments.overrides)


def _benchmark(arguments: argparse.Namespace) -> int | None:
    from tiller.commands import benchmark

    return benchmark.run(arguments.model, arguments.suite, Path(arguments.output), arguments.overrides)


def _label(arguments: argparse.Namespace) -> int | None:
    from tiller.commands import label

    return label.run(Path(arguments.pictures), arguments.by, Path(arguments.output), arguments.overrides)


def _fit_reward(arguments: argparse.Namespace) -> int | None:
    from tiller.commands import fit_reward

    return fit_reward.run(Path(arguments.data), Path(arguments.output), arguments.overrides)


def _audit(arguments: argparse.Namespace) -> int | None:
    from tiller.commands import audit

    file = None if arguments.audit is None else Path(arguments.audit)
    return audit.run(Path(arguments.run), file, arguments.overrides)


def _export(arguments: argparse.Namespace) -> int | None:
    from tiller.commands import export

    wish = export.Wish(
        arguments.format,
        arguments.output,
        arguments.weights,
        arguments.dtype,
        arguments.verify,
        arguments.push_to_hub,
        arguments.public,
    )
    return export.run(Path(arguments.run), wish)


def _pretrain(arguments: argparse.Namespace) -> None:
    from tiller import pretrain
    from tiller.pretrain import kinds

    settings = kinds.load(arguments.config, arguments.overrides)
    quiet.hide_bars()
    print(pretrain.run(settings))


def _compare(arguments: argparse.Namespace) -> int | None:
    from tiller import config
    from tiller.comparison import Comparison

    named = [Path(name) for name in arguments.comparison if "=" not in name or Path(name).exists()]
    pairs = [name for name in arguments.comparison if Path(name) not in named]
    if named and all(path.is_dir() for path in named):
        if len(named) < 2 or pairs or arguments.overrides:
            raise ConfigError("runs are compared with each other; give two run folders or more, and no settings.")
        from tiller.commands import compare

        return compare.runs(named, Path(arguments.output))
    if len(named) != 1:
        raise ConfigError("give one COMPARISON.yaml, or two run folders or more.")
    comparison = config.load(Comparison, named[0], [*pairs, *arguments.overrides])
    from tiller.commands import compare

    return compare.run(comparison, named[0])


def _report(arguments: argparse.Namespace) -> int:
    from tiller.commands import report

    return report.run(Path(arguments.run), serve=arguments.live, port=arguments.port)


def _diagnose(arguments: argparse.Namespace) -> int:
    from tiller.commands import report

    return report.findings(Path(arguments.run))


def _vote(arguments: argparse.Namespace) -> int | None:
    from tiller.commands import vote

    return vote.run(
        Path(arguments.source),
        against=arguments.against and Path(arguments.against),
        votes=arguments.votes and Path(arguments.votes),
        host=arguments.host,
        port=arguments.port,
        allow_remote=arguments.allow_remote,
        seed=arguments.seed,
        only_summary=arguments.summary,
    )


def _serve(arguments: argparse.Namespace) -> int | None:
    from tiller import config

    settings = config.parse_pairs(arguments.overrides)
    from tiller.commands import serve

    return serve.run(
        arguments.reward,
        settings,
        host=arguments.host,
        port=arguments.port,
        token=arguments.token,
        token_env=arguments.token_env,
        hosts=arguments.allow_host or (),
        calls=arguments.calls,
        timeout=arguments.timeout,
    )


def _prompts(arguments: argparse.Namespace) -> int | None:
    from tiller import config
    from tiller.commands import prompts

    wanted = config.load(prompts.Wanted, None, arguments.overrides)
    return prompts.run(arguments.kind, Path(arguments.file), wanted)


def _doctor(arguments: argparse.Namespace) -> int:
    from tiller import doctor

    checks = doctor.examine()
    print(doctor.report(checks))
    return USER_ERROR if any(check.problem for check in checks) else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; `key=value` may stand anywhere after the command, also behind options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    pairs = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(pairs) < len(rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unknown arguments: {' '.join(word for word in rest if word not in pairs) or ' '.join(rest)}")
    if hasattr(arguments, "overrides"):
        arguments.overrides = [*arguments.overrides, *pairs]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tiller", description="Steer image generators with rewards.")
    parser.add_argument("--version", action="version", version=f"tiller {metadata.version('tiller')}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error that has a cure, too")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _makes(commands)
    _measures(commands)
    _judges(commands)
    _hands_on(commands)
    return parser


def _makes(commands: Any) -> None:
    """Commands that train and draw."""
    train = commands.add_parser("train", help="train a model as a recipe says")
    train.add_argument("recipe", metavar="RECIPE.yaml")
    train.add_argument("--dry-run", action="store_true", help="say what it will take, and load nothing")
    train.add_argument("--calibrate", action="store_true", help="a dry run that measures this machine first")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint, and fail without one")
    _takes_overrides(train, _train, "settings that replace the recipe's, such as train.epochs=5")

    demo = commands.add_parser("demo", help="train the model that comes with tiller, for a few minutes")
    demo.add_argument("--output", metavar="DIR", help="where the run goes")
    _takes_overrides(demo, _demo, "settings that replace the demo's")

    sample = commands.add_parser("sample", help="draw pictures from a model or a run")
    sample.add_argument(
        "model", metavar="MODEL", help="a run folder, a pipeline folder, a name on the hub, emoji or emoji-flow"
    )
    sample.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    sample.add_argument("--prompts", metavar="SOURCE", help="a .txt or .jsonl file or a built-in set")
    sample.add_argument("--adapter", metavar="PATH", help="a LoRA to put on the model")
    sample.add_argument("--per-prompt", type=int, default=1, metavar="N")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--output", default="samples", metavar="DIR")
    _takes_overrides(sample, _sample, "the pipeline's call arguments, such as guidance_scale=3")

    pretrain = commands.add_parser("pretrain", help="train a small model from scratch: text-to-image, CLIP or LLaVA")
    pretrain.add_argument("--config", metavar="FILE.yaml", help="settings; without, those of the shipped model")
    _takes_overrides(pretrain, _pretrain, "settings, such as output=my_model data=my_pictures")


def _measures(commands: Any) -> None:
    """Commands that say what a run or a model is worth."""
    evaluate = commands.add_parser("evaluate", help="compare base and tuned model of a run, on held-out prompts")
    evaluate.add_argument("run", metavar="RUN")
    _takes_overrides(evaluate, _evaluate, "evaluation settings, such as samples_per_prompt=8")

    benchmark = commands.add_parser("benchmark", help="draw a suite of prompts by a fixed protocol, and measure")
    benchmark.add_argument("model", metavar="MODEL", help="a run folder, a pipeline folder, a name on the hub, emoji")
    benchmark.add_argument("suite", metavar="SUITE", help="a .jsonl file shaped as DrawBench, PartiPrompts or GenEval")
    benchmark.add_argument("--output", default="benchmark.json", metavar="FILE.json")
    _takes_overrides(benchmark, _benchmark, "the protocol, such as rewards=[clip_score] samples_per_prompt=4")

    audit = commands.add_parser("audit", help="what training did to what prompts leave open: colours, sides, genders")
    audit.add_argument("run", metavar="RUN")
    audit.add_argument("--audit", metavar="FILE.yaml", help="prompts and who reads them; without, the embedded world's")
    _takes_overrides(audit, _audit, "settings, such as samples_per_prompt=32")

    compare = commands.add_parser(
        "compare", help="run variants of a recipe at an equal budget; or lay runs side by side"
    )
    compare.add_argument(
        "comparison", nargs="+", metavar="COMPARISON.yaml | RUN RUN ...", help="and settings, such as jobs=2 seeds=[0]"
    )
    compare.add_argument("--output", default="comparison.html", metavar="FILE", help="the page of runs side by side")
    compare.set_defaults(command=_compare, overrides=[])

    report = commands.add_parser("report", help="a run as one HTML file, RUN/report.html")
    report.add_argument("run", metavar="RUN")
    report.add_argument("--live", action="store_true", help="serve it on this machine while the run goes on")
    report.add_argument("--port", type=int, default=0, help="of --live; without, a free one")
    report.set_defaults(command=_report)

    diagnose = commands.add_parser("diagnose", help="what the numbers of a run say is wrong with it")
    diagnose.add_argument("run", metavar="RUN")
    diagnose.set_defaults(command=_diagnose)


def _judges(commands: Any) -> None:
    """Commands about what is asked for, and who judges it."""
    vote = commands.add_parser("vote", help="let people say which of two pictures is better, on a page of this machine")
    vote.add_argument("source", metavar="RUN", help="a run folder, a folder of tiller sample, or a .jsonl of pairs")
    vote.add_argument(
        "--against", metavar="DIR", help="a second folder, whose pictures of the same prompts are set beside"
    )
    vote.add_argument(
        "--votes", metavar="FILE.jsonl", help="where votes go; by default into the folder or beside the file"
    )
    vote.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    vote.add_argument("--port", type=int, default=0, help="0 takes a free one")
    vote.add_argument("--allow-remote", action="store_true", help="other machines may reach the page, as --host says")
    vote.add_argument("--seed", type=int, default=0, help="of which picture is on the left, and of a file's order")
    vote.add_argument("--summary", action="store_true", help="say what the votes so far come to, and serve no page")
    vote.set_defaults(command=_vote)

    label = commands.add_parser("label", help="let a reward say in people's place which pictures are better")
    label.add_argument("pictures", metavar="PICTURES", help="a folder of tiller sample, or a run folder")
    label.add_argument("--by", required=True, metavar="REWARD", help="a built-in one, or your own as for reward:")
    label.add_argument("--output", default="pairs.jsonl", metavar="FILE.jsonl", help="where the answers go")
    _takes_overrides(label, _label, "settings, such as temperature=0.5 pairs_per_prompt=4 write=labels threshold=-1")

    fit_reward = commands.add_parser("fit-reward", help="learn a reward from preference pairs, votes or labels")
    fit_reward.add_argument(
        "data", metavar="DATA", help="pairs as `data:` takes them, a votes file, or labels (.jsonl)"
    )
    fit_reward.add_argument("--output", default="reward", metavar="DIR", help="where the reward goes")
    _takes_overrides(fit_reward, _fit_reward, "settings, such as clip=emoji-clip fit.members=8")

    serve = commands.add_parser("serve", help="put a reward behind HTTP, for runs elsewhere")
    serve.add_argument("reward", metavar="REWARD", help="a built-in, package.module:name, or path/file.py:name")
    serve.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; any but the loopback needs a token"
    )
    serve.add_argument("--port", type=int, default=8700, help="0 takes a free one")
    serve.add_argument("--token-env", metavar="NAME", help="the environment variable with the token that clients give")
    serve.add_argument("--token", help="the token itself, which every user of this machine can see in the process list")
    serve.add_argument("--allow-host", action="append", metavar="NAME", help="a further name of this server")
    serve.add_argument("--calls", type=int, default=1, metavar="N", help="calls of the reward at once")
    serve.add_argument("--timeout", type=float, default=240.0, metavar="S", help="seconds for one request")
    _takes_overrides(serve, _serve, "settings of the reward, such as model=some/path")

    prompts = commands.add_parser("prompts", help="have a language model write prompts, or change a word of each")
    prompts.add_argument("kind", choices=["new", "vary", "contrast"], metavar="new|vary|contrast")
    prompts.add_argument("file", metavar="FILE.jsonl", help="where they go")
    _takes_overrides(prompts, _prompts, "settings, such as topic='animals at work' count=200 model=FOLDER")


def _hands_on(commands: Any) -> None:
    """Commands about what leaves, and about this machine."""
    export = commands.add_parser("export", help="write a run's weights for diffusers, kohya's tools or ComfyUI")
    export.add_argument("run", metavar="RUN")
    export.add_argument("--format", choices=("diffusers", "kohya", "comfyui", "merged"), default="diffusers")
    export.add_argument("--output", metavar="DIR_OR_FILE", help="by default RUN/export/FORMAT")
    export.add_argument("--weights", default="model", metavar="WHICH", help="model, last, ema, best, or a kept epoch")
    export.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    export.add_argument("--no-verify", dest="verify", action="store_false", help="do not read the export back")
    export.add_argument("--push-to-hub", metavar="NAME", help="upload it, private, as this repository")
    export.add_argument("--public", action="store_true", help="with --push-to-hub: for everybody to see")
    export.set_defaults(command=_export)

    commands.add_parser("doctor", help="check this machine").set_defaults(command=_doctor)


def _takes_overrides(parser: argparse.ArgumentParser, command: object, words: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=words)
    parser.set_defaults(command=command)

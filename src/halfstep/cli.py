"""`halfstep <command> --flags`: a command's signature is its interface; nothing is imported before it is called."""

import importlib
import sys

COMMANDS = {  # name: (module:function, what it does)
    "prepare-corpus": ("halfstep.commands.data:prepare_corpus", "write tokens, tokenizer and held-out split of a corpus"),
    "pretrain": ("halfstep.commands.train:pretrain", "train the teacher, a masked diffusion language model"),
    "train-baseline": ("halfstep.commands.train:train_baseline", "train the autoregressive peer: baseline, and judge at laptop scale"),
    "distill-round": ("halfstep.commands.distill:distill_round", "one round of SDTT: the student learns two teacher steps in one"),
    "generate": ("halfstep.commands.generate:generate", "draw samples from a checkpoint at one step count"),
    "score-samples": ("halfstep.commands.evaluate:score_samples", "generative perplexity, entropy and consistency of samples"),
    "score-corpus": ("halfstep.commands.evaluate:score_corpus", "the same measures of held-out text itself"),
    "score-lambada": ("halfstep.commands.evaluate:score_lambada", "last-word accuracy and perplexity through lm-eval"),
    "time-sampling": ("halfstep.commands.benchmark:time_sampling", "time students against the baseline with its KV cache"),
    "tabulate": ("halfstep.commands.report:tabulate", "gather metric rows into tables"),
    "plot": ("halfstep.commands.report:plot", "draw one figure from the tables"),
    "track": ("halfstep.commands.track:track", "send the journals to MLflow, idempotently"),
    "summary": ("halfstep.commands.report:summary", "print the tables, two texts and where everything lies"),
    "write-schema": ("halfstep.commands.config:write_schema", "write the JSON schema of config.yaml, for editors"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:15} {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: halfstep <command> [--flags]     (halfstep <command> --help lists a command's flags)\n\n{rows}"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(argv[0], COMMANDS, 1, 0.4)
        print(f"halfstep: unknown command {argv[0]!r}" + (f"; did you mean {near[0]}?" if near else "; see halfstep --help"), file=sys.stderr)
        return 2
    import pydantic
    import tyro

    from halfstep.config import explain
    from halfstep.errors import HalfstepError

    module, function = COMMANDS[argv[0]][0].split(":")
    command = getattr(importlib.import_module(module), function)
    try:
        tyro.cli(command, prog=f"halfstep {argv[0]}", args=argv[1:], config=(tyro.conf.OmitArgPrefixes,))
    except pydantic.ValidationError as error:
        print("\n".join(f"halfstep {argv[0]}: {line}" for line in explain(error)), file=sys.stderr)
        return 1
    except HalfstepError as error:
        print(f"halfstep {argv[0]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

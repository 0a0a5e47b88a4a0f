"""The commands of halfstep. A command's module is imported only when it is called."""

GROUPS = {  # title in the help: {name: (module:function, what it does)}
    "Every day": {
        "init": (
            "halfstep.commands.init:init",
            "write a project for your own text, with sizes and steps for this machine",
        ),
        "run": (
            "halfstep.commands.run:run",
            "run the workflow in this folder, with any options of snakemake",
        ),
        "doctor": (
            "halfstep.commands.doctor:doctor",
            "check this machine and its cluster, and say what to do",
        ),
        "plan": (
            "halfstep.commands.plan:plan",
            "estimate GPU-hours, disk space and the longest path of the graph",
        ),
        "summary": (
            "halfstep.commands.report:summary",
            "print what was found, three texts, and where the rest is",
        ),
        "ui": ("halfstep.commands.ui:ui", "show the runs in MLflow, at the loss curves of three"),
        "generate": (
            "halfstep.commands.generate:generate",
            "print texts of a model, show how they are denoised, or write them to files",
        ),
        "write": (
            "halfstep.commands.write:write",
            "continue or fill in the texts that you type, in a loop",
        ),
    },
    "Commands of the rules": {
        "fetch": (
            "halfstep.commands.fetch:fetch",
            "download text, tokenizers, judges and weights for nodes without internet",
        ),
        "prepare-corpus": (
            "halfstep.commands.data:prepare_corpus",
            "write the tokens, tokenizer and held-out split of a corpus",
        ),
        "pretrain": (
            "halfstep.commands.train:pretrain",
            "train the teacher, a masked diffusion language model",
        ),
        "train-baseline": (
            "halfstep.commands.train:train_baseline",
            "train the autoregressive baseline, which is also the judge at laptop scale",
        ),
        "import": (
            "halfstep.commands.import_weights:import_checkpoint",
            "make a checkpoint of published weights (MDLM, SDTT), from a file or the hub",
        ),
        "import-baseline": (
            "halfstep.commands.import_baseline:import_baseline",
            "make an autoregressive baseline of any causal language model of transformers",
        ),
        "distill-round": (
            "halfstep.commands.distill:distill_round",
            "run one round of SDTT: one student step replaces several teacher steps",
        ),
        "draw-naive": (
            "halfstep.commands.draw_naive:draw_naive",
            "draw texts of naive samplers without a network, which metrics should rank last",
        ),
        "score-samples": (
            "halfstep.commands.evaluate:score_samples",
            "measure generative perplexity, entropy and consistency of samples",
        ),
        "score-corpus": (
            "halfstep.commands.evaluate:score_corpus",
            "measure the same for held-out text",
        ),
        "score-frontier": (
            "halfstep.commands.frontier:score_frontier",
            "measure the same, and perplexity against entropy over temperatures",
        ),
        "score-lambada": (
            "halfstep.commands.last_words:score_lambada",
            "measure last-word accuracy and perplexity through lm-eval",
        ),
        "score-infilling": (
            "halfstep.commands.infilling:score_infilling",
            "measure accuracy of filled-in positions against tokens per forward",
        ),
        "score-tasks": (
            "halfstep.commands.zero_shot:score_tasks",
            "answer tasks of lm-eval, such as ARC and HellaSwag",
        ),
        "score-perplexity": (
            "halfstep.commands.zero_shot:score_perplexity",
            "measure zero-shot perplexity of texts",
        ),
        "continue-prompts": (
            "halfstep.commands.continuations:continue_prompts",
            "continue the beginnings of held-out documents",
        ),
        "score-continuations": (
            "halfstep.commands.continuations:score_continuations",
            "measure MAUVE, self-BLEU and perplexity of continuations",
        ),
        "latency": (
            "halfstep.commands.benchmark:latency",
            "time students at each step count against autoregressive baselines",
        ),
        "tabulate": ("halfstep.commands.report:tabulate", "gather metric rows into tables"),
        "plot": ("halfstep.commands.report:plot", "draw one figure from the tables"),
        "list-sizes": (
            "halfstep.commands.paper:list_sizes",
            "write the network sizes of the paper with their parameters",
        ),
        "compare-published": (
            "halfstep.commands.paper:compare_published",
            "write published numbers and claims next to ours, with a verdict",
        ),
        "start-page": (
            "halfstep.commands.start_page:start_page",
            "write results/index.html, the page to open first, and a page of texts",
        ),
        "track": ("halfstep.commands.track:track", "send the journals to MLflow, idempotently"),
        "merge-provenance": (
            "halfstep.commands.verify:merge_provenance",
            "gather the records of all artifacts in results/provenance.json",
        ),
    },
    "Rarely needed": {
        "verify": (
            "halfstep.commands.verify:verify",
            "recompute all checksums, and list what is changed, missing or stale",
        ),
        "export": (
            "halfstep.commands.export_model:export_checkpoint",
            "write a folder for transformers, with a model card, and push it to the hub",
        ),
        "trust": (
            "halfstep.commands.trust:trust",
            "allow the code that a checkpoint's model brings to run in this account",
        ),
        "write-schema": (
            "halfstep.commands.config:write_schema",
            "write the JSON schema of config.yaml, for editors",
        ),
    },
}
COMMANDS = {name: row for group in GROUPS.values() for name, row in group.items()}

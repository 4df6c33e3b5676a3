"""``ia2 train`` and ``ia2 probe``."""

from __future__ import annotations

from typing import Any

from ia2.cli.options import JSON, OVERWRITE, QUIET, with_settings
from ia2.config import ProbeConfig, TrainConfig
from ia2.config.reading import code_flags


@with_settings(TrainConfig)
def train(config: TrainConfig, json: bool = JSON, quiet: bool = QUIET, overwrite: bool = OVERWRITE) -> None:
    """Turn labelled examples into an adapter.

    Example: ia2 train --model Qwen/Qwen3-4B-Base --data reviews.jsonl --output-dir out/reviews
    """
    from ia2.cli.output import print_json, print_metrics, start_run
    from ia2.utils.distributed import is_first

    folder = start_run(config, quiet)
    from ia2.experiment.adapt import adapt, load_both, load_unlabelled

    examples, test = load_both(config)
    more = load_unlabelled(config)
    result = adapt(
        config.model, examples, config, test=test, output_dir=folder, overwrite=overwrite, unlabelled=more
    )
    if not is_first():
        return
    if json:
        print_json({**result.metrics, "output_dir": folder})
        return
    print_metrics(result.metrics)
    print(f"\nAdapter, model card and metrics: {folder}")
    code = code_flags({**config.model_dump(), "context_function": None})  # predicting shows no context
    again = "".join(f" {flag}" for flag in code.values())
    print(f"Next: ia2 predict --adapter {folder} --data new.jsonl{again}")
    print(f"Report: ia2 report {folder}")


# it trains nothing on unlabelled rows, and chooses nothing
@with_settings(
    ProbeConfig, leave_out=("recipe", "unlabelled", "max_unlabelled", "unlabelled_split", "selection")
)
def probe(config: ProbeConfig, json: bool = JSON, quiet: bool = QUIET) -> None:
    """Will IA2 help here? ICL against quick fine-tuning and the bare model on your rows, and the cost."""
    from ia2.cli.output import print_json, start

    start(quiet)
    from ia2.experiment import probe as probing
    from ia2.experiment.adapt import load_examples

    found = probing.probe(config.model, load_examples(config), config)
    if json:
        print_json(found.to_dict())
        return
    _print_facts(found.facts)
    print(f"Verdict: {found.verdict}. {found.reason}")


def _print_facts(facts: dict[str, Any]) -> None:
    accuracy, cost, sft = facts["accuracy"], facts["cost"], facts["sft"]
    name = "in-context learning" if facts["demonstrations"] else "with its context"
    print(f"Accuracy on {facts['rows']} rows, among the labels (over the vocabulary):")
    if sft is not None:
        rows = f"held out, {sft['rows']} other rows or more"
        trained = f"{rows}, {sft['steps']} steps at {sft['rate']:g}"
        print(f"  {name:21} {accuracy['icl']:8.1%}   {rows} in the prompt")
        print(f"  fine-tuning           {accuracy['sft']:8.1%}   {trained}")
    alone, over = accuracy["icl_leave_one_out"], accuracy["icl_leave_one_out_vocabulary"]
    print(f"  {name:21} {alone:8.1%}   ({over:.1%}) {facts['context']}")
    print(f"  base model            {accuracy['base']:8.1%}   ({accuracy['base_vocabulary']:.1%})")
    print(f"  most frequent label   {accuracy['most_frequent_label']:8.1%}")
    megabytes, steps = cost["target_bytes"] / 1e6, cost["max_steps_a_stage"]
    print(f"Cost of ia2-sft on {cost['num_train']} training rows on this machine:")
    print(f"  teacher pass          {cost['teacher_seconds']:.0f} s, {megabytes:.1f} MB of targets")
    print(
        f"  training              {cost['step_seconds']:.2f} s a step, at most {steps} steps a stage: "
        f"at most {cost['training_seconds_at_most']:.0f} s (early stopping usually ends far sooner)"
    )
    if facts["unlabelled"]:
        print(facts["unlabelled"])

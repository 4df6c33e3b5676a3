"""Rules on similarity to ICL, and on the answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ia2.report.doctor.facts import ArmFacts, Facts
from ia2.report.doctor.findings import (
    CannotTell,
    Finding,
    accuracy_difference,
    asim_difference,
    correct_in,
    difference_interval,
    guessing,
    need_labels,
    need_recipes,
    not_yet,
    place_of,
    range_text,
    trained_arms,
)

# Thresholds, as in docs/doctor.md.
GAIN = 0.02  # asim that alignment must add before any of it can be lost
KEPT = 1 / 3  # share of that gain that fine-tuning must leave


def _method_and_sft(facts: Facts) -> Iterator[tuple[ArmFacts, ArmFacts]]:
    """Each arm of the method with plain fine-tuning of the same adapter."""
    for arm in facts.arms:
        rival = facts.arm("sft", arm.variant)
        if arm.recipe == "ia2-sft" and rival is not None:
            yield arm, rival


# --------------------------------------------------------------------------------------------- inside


def asim_no_gain(facts: Facts) -> Iterable[Finding]:
    """IA2 → SFT is no nearer to ICL than SFT alone: the method's known failure signature."""
    need_recipes(facts, "ia2-sft", "sft")
    told = False
    for arm, rival in _method_and_sft(facts):
        found = asim_difference(facts, arm, rival)
        if found is None:
            continue
        told = True
        difference, how = found
        if difference["low"] > 0:
            continue
        none = difference["value"] <= 0
        yield Finding(
            "asim-no-gain",
            "problem" if none else "warning",
            "After alignment and fine-tuning the model is no nearer to ICL than after fine-tuning alone."
            if none
            else "That alignment and fine-tuning end nearer to ICL than fine-tuning alone is not certain.",
            f"asim {facts.mean_asim(arm):.3f} against {facts.mean_asim(rival):.3f}: difference "
            f"{difference['value']:+.3f} {range_text(difference)} ({how})",
            "see whether the alignment itself worked (ia2 in --recipes); --align-epochs, --align-normalise, "
            "--align-layers middle-third, a gentler second stage (--sft-learning-rate, --sft-ia2-weight)",
            place_of(facts, f"{arm.name}, {rival.name}"),
            difference,
        )
    if not told:
        raise not_yet(facts, "similarities to ICL of ia2-sft and sft")


def sft_undid_alignment(facts: Facts) -> Iterable[Finding]:
    """Fine-tuning threw away what alignment had won."""
    if facts.kind == "train":
        raise CannotTell(
            "ia2 train measures similarity to ICL after the last stage only; ia2 compare shows both"
        )
    need_recipes(facts, "ia2", "ia2-sft")
    told = False
    for arm in facts.arms:
        aligned = facts.arm("ia2", arm.variant)
        rival = facts.arm("sft", arm.variant) or facts.arm("base")
        if arm.recipe != "ia2-sft" or aligned is None or rival is None:
            continue
        after, before, start = (facts.mean_asim(a) for a in (arm, aligned, rival))
        if after is None or before is None or start is None:
            continue
        told = True
        if before - start < GAIN:
            continue  # nothing was won; other rules say so
        kept = (after - start) / (before - start)
        if kept < KEPT:
            yield Finding(
                "sft-undid-alignment",
                "problem" if kept <= 0 else "warning",
                "Fine-tuning undid the alignment: most of the similarity to ICL is gone after it.",
                f"asim {before:.3f} after alignment, {after:.3f} after fine-tuning, {start:.3f} with "
                f"{rival.name}: {kept:.0%} of the gain is left",
                "--sft-learning-rate (a third of it), fewer --sft-epochs, or keep the alignment loss beside "
                "cross-entropy (--sft-ia2-weight 0.1)",
                place_of(facts, arm.name),
                {"aligned": before, "fine_tuned": after, "reference": start, "kept": kept},
            )
    if not told:
        raise not_yet(facts, "similarities to ICL of ia2, ia2-sft and sft or base")


def alignment_not_carried_over(facts: Facts) -> Iterable[Finding]:
    """On test queries the aligned model is no nearer to ICL than the base."""
    need_recipes(facts, "base", "ia2")
    base = facts.arm("base")
    assert base is not None
    told = False
    for arm in facts.arms:
        if arm.recipe != "ia2" or (found := asim_difference(facts, arm, base)) is None:
            continue
        told = True
        difference, how = found
        if difference["low"] <= 0:
            yield Finding(
                "alignment-not-carried-over",
                "problem" if difference["value"] <= 0 else "warning",
                "On the test queries alignment brought the model no nearer to ICL than the base model is.",
                f"asim {facts.mean_asim(arm):.3f} against {facts.mean_asim(base):.3f}: difference "
                f"{difference['value']:+.3f} {range_text(difference)} ({how})",
                "if the alignment loss fell, more training rows (--num-examples) or several orders "
                "(--context-draws 8); else a higher rate and more --align-epochs",
                place_of(facts, arm.name),
                difference,
            )
    if not told:
        raise not_yet(facts, "similarities to ICL of ia2 and base")


# -------------------------------------------------------------------------------------------- answers


def labels_of_several_tokens(facts: Facts) -> Iterable[Finding]:
    """Answers are labels of more than one token."""
    need_labels(facts)
    if facts.single_token is None:
        raise not_yet(facts, "the labels' tokens")
    if facts.single_token:
        return
    lengths = facts.label_tokens
    tokens = f"of up to {max(lengths)} tokens" if lengths else "of several tokens"
    longest = [label for label, k in zip(facts.labels, lengths, strict=False) if k == max(lengths)]
    shown = ", ".join(repr(label) for label in (longest or facts.labels)[:3])
    yield Finding(
        "labels-of-several-tokens",
        "note",
        "Labels have several tokens: scoring takes longer, and confidences are of whole labels.",
        f"{len(facts.labels)} labels {tokens} ({shown})",
        "words of one token with --label-map; ECE is not comparable with that of one-token labels",
        numbers={"labels": len(facts.labels), "longest": max(lengths, default=None)},
    )


def worse_than_base(facts: Facts) -> Iterable[Finding]:
    """Training made the model worse than it was."""
    need_recipes(facts, "base")
    base = facts.arm("base")
    assert base is not None
    told = False
    for arm in trained_arms(facts):
        difference = accuracy_difference(facts, arm, base)
        if difference is None:
            continue
        told = True
        if difference["high"] < 0:
            yield Finding(
                "worse-than-base",
                "problem",
                "The trained model is worse than the base model without demonstrations.",
                f"accuracy {_in(facts)} {facts.mean(arm, facts.scope, 'accuracy'):.3f} against "
                f"{facts.mean(base, facts.scope, 'accuracy'):.3f}: difference {difference['value']:+.3f} "
                f"{range_text(difference)} (paired by row and seed)",
                "a lower rate (--learning-rates), more rows (--num-examples); see the findings on training",
                place_of(facts, arm.name),
                difference,
            )
    if not told:
        raise CannotTell("no predictions of a trained recipe and of the base on the same rows")


def _in(facts: Facts) -> str:
    return "in the label set" if facts.scope == "labels" else "of answers"


def worse_than_guessing(facts: Facts) -> Iterable[Finding]:
    """No better than always answering the most frequent label."""
    need_labels(facts)
    told = False
    for arm in trained_arms(facts):
        value = facts.mean(arm, "labels", "accuracy")
        if value is None:
            continue
        told = True
        guess = guessing(facts, arm)
        if value <= guess:
            n = sum(len(e.places) for e in facts.evaluations(arm.name))
            yield Finding(
                "worse-than-guessing",
                "problem",
                "The trained model is no better than always answering the most frequent label.",
                f"accuracy in the label set {value:.3f}, guessing {guess:.3f}"
                + (f", on {n} answers" if n else ""),
                "ia2 probe tells whether the model can do the task; more rows (--num-examples), "
                "another rate (--learning-rates)",
                place_of(facts, arm.name),
                {"accuracy": value, "guessing": guess},
            )
    if not told:
        raise not_yet(facts, "evaluations of a trained recipe")


def worse_than_sft(facts: Facts) -> Iterable[Finding]:
    """The method lost to plain fine-tuning."""
    need_recipes(facts, "ia2-sft", "sft")
    told = False
    for arm, rival in _method_and_sft(facts):
        difference = difference_interval(facts.columns((arm.name, rival.name), correct_in(facts.scope)))
        if difference is None:
            difference = facts.differences.get(f"{arm.name} − {rival.name}", {}).get("accuracy")
        if difference is None or difference["high"] is None:
            continue
        told = True
        if difference["high"] < 0:
            yield Finding(
                "worse-than-sft",
                "warning",
                "Alignment before fine-tuning made the answers worse than fine-tuning alone.",
                f"accuracy {difference['value']:+.3f} {range_text(difference)} (paired by row and seed)",
                "--recipe sft here; or see what is said of ICL and of the alignment",
                place_of(facts, f"{arm.name}, {rival.name}"),
                dict(difference),
            )
    if not told:
        raise not_yet(facts, "predictions of ia2-sft and sft")

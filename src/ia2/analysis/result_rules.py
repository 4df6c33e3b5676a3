"""Rules on similarity to ICL, and on the answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from ia2.analysis.facts import ArmFacts, Facts
from ia2.analysis.findings import (
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
    percent,
    place_of,
    range_text,
    trained_arms,
)
from ia2.recipes import ALIGN, JOINT

# Thresholds; docs/doctor.md has them with their reasons.
GAIN = 0.02  # asim that alignment must add before any of it can be lost
KEPT = 1 / 3  # share of that gain that fine-tuning must leave
DOMINANT, MIN_LAYERS = 0.5, 4  # share of one layer in the squared distance, of at least so many
ONE_LABEL, ONE_LABEL_EXCESS = 0.9, 0.2  # share of the commonest prediction; how much commoner than it is true
SURE, SURE_EXCESS = 0.95, 0.15  # mean confidence; how far above the accuracy
UNDECIDED = 0.1  # of the way from 1/labels to 1
FORMAT_GAP = 0.2  # accuracy in the label set less that over the vocabulary
LITTLE_MASS = 0.05  # of the probability that falls on the labels


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


def one_layer_dominates(facts: Facts) -> Iterable[Finding]:
    """One layer is most of the squared distance that alignment minimises."""
    aligning = [arm for arm in facts.arms if ALIGN in arm.stages or JOINT in arm.stages]
    if not aligning:
        raise CannotTell("nothing is aligned here")
    plain = [arm for arm in aligning if _plain_mse(arm)]
    if not plain:
        raise CannotTell("layers are normalised, or the objective has no such scale")
    # before training, the distance of the base is the loss
    base = facts.arm("base")
    source = base if base is not None and facts.layers(base) is not None else plain[0]
    layers = facts.layers(source)
    if layers is None:
        raise not_yet(facts, "distances by layer")
    chosen = next((s.layers for r in facts.rounds for s in r.stages if s.layers is not None), None)
    squares = {k: x * x for k, x in zip(layers.numbers, layers.l2, strict=True) if not chosen or k in chosen}
    if len(squares) < MIN_LAYERS:
        raise CannotTell(f"fewer than {MIN_LAYERS} layers are aligned")
    top = max(squares, key=lambda k: squares[k])
    share = squares[top] / max(sum(squares.values()), 1e-30)
    if share > DOMINANT:
        yield Finding(
            "one-layer-dominates",
            "warning",
            "One layer is most of the alignment loss; the others are hardly aligned.",
            f"layer {top} has {percent(share)} of the squared distance to ICL over {len(squares)} layers "
            f"({'base model' if source is base else source.name}, test queries)",
            f"--align-normalise, --align-objective cosine, or leave layer {top} out of --align-layers",
            place_of(facts, source.name),
            {"layer": top, "share": share, "layers": len(squares)},
        )


def _plain_mse(arm: ArmFacts) -> bool:
    section = None if arm.config is None else arm.config.align if ALIGN in arm.stages else arm.config.joint
    return section is None or (section.objective == "mse" and not section.normalise)


# -------------------------------------------------------------------------------------------- answers


def confidence_collapse(facts: Facts) -> Iterable[Finding]:
    """Nearly always one label, or confidences that say nothing."""
    need_labels(facts)
    arms = [arm for arm in facts.arms if arm.recipe != "base"]
    seen = False
    for arm in arms:
        evaluations = [e for e in facts.evaluations(arm.name) if len(e.predicted)]
        if not evaluations:
            continue
        seen = True
        labels = len(facts.labels) or len(evaluations[0].label_names)
        predicted = Counter(answer for e in evaluations for answer in e.predicted)
        gold = Counter(answer for e in evaluations for answer in e.gold)
        label, count = predicted.most_common(1)[0]
        share, true = count / predicted.total(), gold[label] / gold.total()
        confidence = float(np.concatenate([e.confidence[facts.scope] for e in evaluations]).mean())
        accuracy = float(np.concatenate([e.correct[facts.scope] for e in evaluations]).mean())
        numbers = {"share": share, "true_share": true, "confidence": confidence, "accuracy": accuracy}
        where = place_of(facts, arm.name)
        if share >= ONE_LABEL and share - true >= ONE_LABEL_EXCESS:
            yield Finding(
                "confidence-collapse",
                "problem",
                f"Nearly every answer is the same label, {label!r}.",
                f"{percent(share)} of the predictions; it is the truth of {percent(true)}",
                "more examples (--num-examples), --demo-order balanced, a lower rate (--learning-rates)",
                where,
                numbers,
            )
        elif confidence >= SURE and confidence - accuracy >= SURE_EXCESS:
            yield Finding(
                "confidence-collapse",
                "warning",
                "The model is nearly certain of every answer, also of the many wrong ones.",
                f"mean confidence {confidence:.3f} over the label set, accuracy {accuracy:.3f}",
                "fewer --sft-epochs or a lower --sft-learning-rate, --recipe ia2-sft instead of sft; until "
                "then the temperature-scaled figures",
                where,
                numbers,
            )
        elif labels > 1 and confidence <= 1 / labels + UNDECIDED * (1 - 1 / labels):
            yield Finding(
                "confidence-collapse",
                "problem",
                "The model does not decide: all labels are about equally probable in every answer.",
                f"mean confidence {confidence:.3f} with {labels} labels ({1 / labels:.3f} if all are equal)",
                "a higher rate (--learning-rates), more --sft-epochs; for ICL label words that the model can "
                "read (--label-map)",
                where,
                numbers,
            )
    if not seen:
        raise not_yet(facts, "predictions")


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


def labels_not_preferred(facts: Facts) -> Iterable[Finding]:
    """The right label beats the others, but something that is no label beats it."""
    need_labels(facts)
    if facts.single_token is False:
        raise CannotTell("labels of several tokens are only compared with each other")
    seen = False
    for arm in facts.arms:
        inside, outside = (facts.mean(arm, scope, "accuracy") for scope in ("labels", "vocabulary"))
        nlls = [facts.mean(arm, scope, "nll") for scope in ("labels", "vocabulary")]
        if inside is None or outside is None or nlls[0] is None or nlls[1] is None:
            continue
        seen = True
        # −log p(gold) less −log p(gold | a label) is −log of the mass of the labels
        mass = math.exp(min(0.0, nlls[0] - nlls[1]))
        bare = not arm.stages
        if inside - outside < FORMAT_GAP or (bare and mass > LITTLE_MASS):
            continue
        yield Finding(
            "labels-not-preferred",
            "note" if bare else "warning",
            "Untrained, the model hardly ever answers with one of the labels."
            if bare
            else "The model often answers with something that is no label where its best label is right.",
            f"accuracy {outside:.3f} over the vocabulary, {inside:.3f} in the label set; labels have "
            f"{mass:.2g} of the probability (geometric mean)",
            "compare recipes by the accuracy in the label set; label words that follow the prompt naturally "
            "(--label-map), a leading space in --completion-template"
            if bare
            else "a stage of fine-tuning after it (--recipe ia2-sft), more --sft-epochs or a higher rate",
            place_of(facts, arm.name),
            {"vocabulary": outside, "labels": inside, "mass": mass},
        )
    if not seen:
        raise not_yet(facts, "evaluations")


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

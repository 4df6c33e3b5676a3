"""Rules on similarity to ICL, on answers, and on rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ia2.report.doctor.facts import CannotTell, Facts, Finding, RoundFacts, Rule, Severity, in_words

# Thresholds, as in docs/doctor.md.
GAIN = 0.02  # asim that alignment must add before any of it can be lost
KEPT = 1 / 3  # share of that gain that fine-tuning must leave


# ---------------------------------------------------------------------------------- similarity to ICL


def asim_no_gain(facts: Facts) -> Iterable[Finding]:
    """IA2 → SFT is no nearer to ICL than SFT alone: the method's known failure signature."""
    facts.need_recipes("ia2-sft", "sft")
    return _no_nearer(
        facts,
        ("ia2-sft", "sft"),
        "After alignment and fine-tuning the model is no nearer to ICL than after fine-tuning alone.",
        "That alignment and fine-tuning end nearer to ICL than fine-tuning alone is not certain.",
        "see whether the alignment itself worked (ia2 in --recipes); --align-epochs, --align-normalise, "
        "--align-layers middle-third, a gentler second stage (--sft-learning-rate, --sft-ia2-weight)",
    )


def sft_undid_alignment(facts: Facts) -> Iterable[Finding]:
    """Fine-tuning threw away what alignment had won."""
    if facts.kind == "train":
        raise CannotTell(
            "ia2 train measures similarity to ICL after the last stage only; ia2 compare shows both"
        )
    facts.need_recipes("ia2", "ia2-sft")
    told = False
    for recipe, aligned in facts.pairs("ia2-sft", "ia2"):
        rival = facts.find("sft", recipe.variant) or facts.find("base")
        if rival is None:
            continue
        after, before, start = (facts.mean_asim(each) for each in (recipe, aligned, rival))
        if after is None or before is None or start is None:
            continue
        told = True
        if before - start < GAIN:
            continue  # nothing was won; other rules say so
        kept = (after - start) / (before - start)
        if kept < KEPT:
            yield Finding(
                "problem" if kept <= 0 else "warning",
                "Fine-tuning undid the alignment: most of the similarity to ICL is gone after it.",
                f"asim {before:.3f} after alignment, {after:.3f} after fine-tuning, {start:.3f} with "
                f"{rival.name}: {kept:.0%} of the gain is left",
                "--sft-learning-rate (a third of it), fewer --sft-epochs, or keep the alignment loss beside "
                "cross-entropy (--sft-ia2-weight 0.1)",
                facts.where(recipe.name),
                {"aligned": before, "fine_tuned": after, "reference": start, "kept": kept},
            )
    if not told:
        raise facts.not_yet("similarities to ICL of ia2, ia2-sft and sft or base")


def alignment_not_carried_over(facts: Facts) -> Iterable[Finding]:
    """On test queries the aligned model is no nearer to ICL than the base."""
    facts.need_recipes("base", "ia2")
    message = "On the test queries alignment brought the model no nearer to ICL than the base model is."
    return _no_nearer(
        facts,
        ("ia2", "base"),
        message,
        message,
        "if the alignment loss fell, more training rows (--num-examples) or several orders "
        "(--context-draws 8); else a higher rate and more --align-epochs",
    )


def _no_nearer(
    facts: Facts, recipes: tuple[str, str], message: str, uncertain: str, advice: str
) -> Iterable[Finding]:
    found = [(a, b, less) for a, b in facts.pairs(*recipes) if (less := facts.asim_difference(a, b))]
    if not found:
        raise facts.not_yet(f"similarities to ICL of {' and '.join(recipes)}")
    for a, b, (difference, how) in found:
        if difference["low"] <= 0:
            none = difference["value"] <= 0
            yield Finding(
                "problem" if none else "warning",
                message if none else uncertain,
                f"asim {facts.mean_asim(a):.3f} against {facts.mean_asim(b):.3f}: difference "
                f"{in_words(difference)} ({how})",
                advice,
                facts.where(a.name if b.recipe == "base" else f"{a.name}, {b.name}"),
                difference,
            )


# ------------------------------------------------------------------------------------------ answers


def labels_of_several_tokens(facts: Facts) -> Iterable[Finding]:
    """Answers are labels of more than one token."""
    facts.need_labels()
    if facts.single_token is None:
        raise facts.not_yet("the labels' tokens")
    if facts.single_token:
        return
    longest = max(facts.label_tokens, default=None)
    tokens = "of several tokens" if longest is None else f"of up to {longest} tokens"
    those = [
        label for label, k in zip(facts.labels, facts.label_tokens, strict=False) if k == longest
    ] or facts.labels
    yield Finding(
        "note",
        "Labels have several tokens: scoring takes longer, and confidences are of whole labels.",
        f"{len(facts.labels)} labels {tokens} ({', '.join(map(repr, those[:3]))})",
        "words of one token with --label-map; ECE is not comparable with that of one-token labels",
        numbers={"labels": len(facts.labels), "longest": longest},
    )


def worse_than_base(facts: Facts) -> Iterable[Finding]:
    """Training made the model worse than it was."""
    facts.need_recipes("base")
    base = facts.find("base")
    assert base is not None
    found = [(each, less) for each in facts.trained if (less := facts.difference(each, base, "correct"))]
    if not found:
        raise CannotTell("no predictions of a trained recipe and of the base on the same rows")
    scope = facts.scope
    for recipe, difference in found:
        if difference["high"] < 0:
            yield Finding(
                "problem",
                "The trained model is worse than the base model without demonstrations.",
                f"accuracy {'in the label set' if scope == 'labels' else 'of answers'} "
                f"{facts.mean_accuracy(recipe):.3f} against {facts.mean_accuracy(base):.3f}: difference "
                f"{in_words(difference)} (paired by row and seed)",
                "a lower rate (--learning-rates), more rows (--num-examples); see the findings on training",
                facts.where(recipe.name),
                difference,
            )


def worse_than_guessing(facts: Facts) -> Iterable[Finding]:
    """No better than always answering the most frequent label."""
    facts.need_labels()
    means = [(each, mean) for each in facts.trained if (mean := facts.mean_accuracy(each)) is not None]
    if not means:
        raise facts.not_yet("evaluations of a trained recipe")
    for recipe, mean in means:
        guess, n = facts.guessing(recipe), sum(a.n for a in facts.answers(recipe.name))
        if mean <= guess:
            yield Finding(
                "problem",
                "The trained model is no better than always answering the most frequent label.",
                f"accuracy in the label set {mean:.3f}, guessing {guess:.3f}"
                f"{f', on {n} answers' if n else ''}",
                "ia2 probe tells whether the model can do the task; more rows (--num-examples), another rate "
                "(--learning-rates)",
                facts.where(recipe.name),
                {"accuracy": mean, "guessing": guess},
            )


def worse_than_sft(facts: Facts) -> Iterable[Finding]:
    """The method lost to plain fine-tuning."""
    facts.need_recipes("ia2-sft", "sft")
    told = False
    for recipe, rival in facts.pairs("ia2-sft", "sft"):
        summed_up = facts.differences.get(f"{recipe.name} − {rival.name}", {}).get("accuracy")
        difference = facts.difference(recipe, rival, "correct") or summed_up
        if difference is None or difference["high"] is None:
            continue
        told = True
        if difference["high"] < 0:
            yield Finding(
                "warning",
                "Alignment before fine-tuning made the answers worse than fine-tuning alone.",
                f"accuracy {in_words(difference)} (paired by row and seed)",
                "--recipe sft here; or see what is said of ICL and of the alignment",
                facts.where(f"{recipe.name}, {rival.name}"),
                dict(difference),
            )
    if not told:
        raise facts.not_yet("predictions of ia2-sft and sft")


# --------------------------------------------------------------------------------------------- rows


def label_missing(facts: Facts) -> Iterable[Finding]:
    """A label that no training (or dev) row has."""
    facts.need_labels()
    rounds = _with_rows(facts)
    known = set(facts.labels) or {answer for each in rounds for _, answer in (*each.train, *each.dev)}  # type: ignore[misc]
    says: dict[str, tuple[Severity, str]] = {
        "train": (
            "warning",
            "A label is in none of the training rows: neither demonstrations nor fine-tuning show it.",
        ),
        "dev": ("note", "A label is in none of the dev rows: what is chosen by them does not look at it."),
    }
    for part, (severity, message) in says.items():
        parts = [rows for each in rounds if (rows := getattr(each, part))]
        lacking = Counter(label for rows in parts for label in known - {answer for _, answer in rows})
        if lacking:
            of = f" in {{}} of {len(rounds)} rounds" if len(rounds) > 1 else ""
            shown = "; ".join(f"{label!r}{of.format(lacking[label])}" for label in sorted(lacking)[:6])
            yield Finding(
                severity,
                message,
                f"no {part} row has {shown}",
                "rows of it in the data, more examples (--num-examples), or balanced draws (--balanced)",
                f"{part} rows",
                {"labels": sorted(lacking)},
            )


def _with_rows(facts: Facts) -> list[RoundFacts]:
    rounds = [each for each in facts.rounds if each.train is not None]
    if not rounds:
        raise CannotTell(f"the training rows are not known: {facts.no_rows or 'they have not been read'}")
    return rounds


def texts_hardly_read(facts: Facts) -> Iterable[Finding]:
    """Labels that nearly match, prompts and answers that meet oddly: what the run said when it began."""
    if facts.advice is None:
        raise facts.not_yet("what was said of labels and prompts")
    for message, evidence, way_out in facts.advice:
        yield Finding("warning", f"{message}.", evidence, way_out, "labels and prompts")


def repeated_rows(facts: Facts) -> Iterable[Finding]:
    """The same prompt in training and test rows, or with two answers."""
    leaks: set[str] = set()
    shared: set[str] = set()
    torn: set[str] = set()
    for each in _with_rows(facts):
        train, dev = ({query for query, _ in rows or ()} for rows in (each.train, each.dev))
        tested = [answers.rows for answers in each.answers.values() if answers.part == "test"]
        leaks |= {str(row["query"]) for rows in tested for row in rows} & (train | dev)
        shared |= train & dev
        times = Counter(query for query, _ in {*(each.train or ()), *(each.dev or ())})
        torn |= {query for query, answers_of in times.items() if answers_of > 1}
    says: tuple[tuple[set[str], Severity, str, str], ...] = (
        (
            leaks,
            "problem",
            "Test rows are among the training or dev rows.",
            "take them out of one file",
        ),
        (shared, "warning", "Training rows are among the dev rows.", "remove repeated rows from the data"),
        (torn, "warning", "The same prompt has different answers.", "mend the labels of these rows"),
    )
    for prompts, severity, message, advice in says:
        if prompts:
            evidence = f"{len(prompts)} prompts, {min(prompts)[:60]!r} for one"
            yield Finding(severity, message, evidence, advice, "rows", {"prompts": len(prompts)})


def evaluated_on_dev(facts: Facts) -> Iterable[Finding]:
    """Figures of the rows that chose the weights."""
    if facts.kind == "compare":
        return
    answers = [found for each in facts.rounds for found in each.answers.values()]
    if not answers:
        raise CannotTell("the evaluation comes last" if facts.missing else "nothing was evaluated")
    if answers[0].part == "dev":
        yield Finding(
            "note",
            "The figures are of the dev rows, which also chose the weights: they flatter.",
            f"{answers[0].n} dev rows, no test rows",
            "--test-data with other rows, or ia2 compare, which cross-fits the rows that there are",
        )


RULES: tuple[Rule, ...] = (
    asim_no_gain,
    sft_undid_alignment,
    alignment_not_carried_over,
    labels_of_several_tokens,
    worse_than_base,
    worse_than_guessing,
    worse_than_sft,
    label_missing,
    texts_hardly_read,
    repeated_rows,
    evaluated_on_dev,
)

"""One model, one set of examples, one seed: training of recipes, and their evaluation.

What recipes share is computed once each: what the teacher gives (:mod:`ia2.teacher.cache`), and stages
that several recipes begin with. What is finished lies in the run's folder and is found there when a killed
run is started again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.adapters.checks import check_adapter
from ia2.adapters.types import default_learning_rate, peft_config
from ia2.adapters.weights import (
    adapter_state,
    attach,
    base_weights,
    detach,
    load_adapter_state,
)
from ia2.config import AdaptConfig
from ia2.config.recipes import CONSTANT, JOINT, LABELLED, SFT, UNLABELLED, is_trained
from ia2.config.sections import AlignConfig, SftConfig, SoftConfig, TaughtConfig
from ia2.data.examples import Example, FewShotSplit
from ia2.evaluation.evaluate import evaluate_prompts, temperature_losses
from ia2.evaluation.metrics import Measured, fitted_temperatures
from ia2.evaluation.scoring import Prediction
from ia2.evaluation.similarity import Similarity, SimilarityMeter
from ia2.models.batching import MAX_LOGITS
from ia2.models.capture import ActivationCapture
from ia2.models.forward import AnswerOutput, answer_pass, half_precision
from ia2.models.load import BaseModel
from ia2.models.tokens import Ids, decode
from ia2.prompts.builder import query_prompts
from ia2.prompts.context import Contexts
from ia2.prompts.own_context import ContextFunction
from ia2.prompts.task import Task
from ia2.teacher.cache import FORMAT, PARTS, SIMILARITY_QUERIES, Key, TeacherCache
from ia2.teacher.layer_choice import choose_layers
from ia2.teacher.targets import OnlineTargets, TargetStore, TeacherAnswer
from ia2.teacher.teacher import ANSWERS, span
from ia2.training.objectives import OBJECTIVES
from ia2.training.run_stage import StageJob, check_trackers, finished_stage, run_stage
from ia2.training.stages import PlannedStage, StageResult, TrainedRecipe, plan, stage_place
from ia2.utils.distributed import gathered, share
from ia2.utils.errors import ConfigError, DataError, DivergedError
from ia2.utils.files import digest

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ia2.training.dataset import AnswerDataset


Pass = tuple[str, "int | None"]
"""Site and top k of a teacher pass (see :class:`ia2.teacher.cache.TeacherCache`)."""


def teacher_passes(stages: Sequence[PlannedStage], config: AdaptConfig) -> list[Pass | None]:
    """The teacher pass that each stage of a recipe learns from; None where it learns nothing from it.

    A stage that needs answers alone takes them from a pass that another stage needs anyway.
    """
    own = [_own_pass(stage, config) for stage in stages]
    shared = next((each for each in own if each not in (None, (ANSWERS, None))), (ANSWERS, None))
    return [shared if each == (ANSWERS, None) else each for each in own]


def held_out(stage: PlannedStage) -> str:
    """The part by whose loss a stage is stopped: no label where it learns from unlabelled rows alone."""
    # fine-tuning is for true answers, whatever it learns from
    return PARTS[LABELLED if stage.kind == SFT else stage.rows[-1]][1]


def answered_parts(stage: PlannedStage) -> set[str]:
    """The parts that a stage needs the teacher's answers to."""
    if not stage.teacher_answers:
        return set()
    parts = {PARTS[kind][0] for kind in stage.rows if kind == UNLABELLED or stage.labelled_answers}
    if stage.beside and stage.answers == "icl_responses":
        parts |= set(PARTS[LABELLED])
    return parts | ({held_out(stage)} if stage.kind != SFT or stage.labelled_answers else set())


def _aligned_part(stage: PlannedStage) -> str:
    """What the shift of layers is measured on."""
    return PARTS[stage.rows[-1]][0]


def _own_pass(stage: PlannedStage, config: AdaptConfig) -> Pass | None:
    if not stage.teacher_answers:
        return None
    if isinstance(stage.settings, SoftConfig):
        return "soft", stage.settings.top_k
    if not stage.aligns:
        return ANSWERS, None
    return OBJECTIVES[_alignment_section(stage, config).objective].site, None


def _alignment_section(stage: PlannedStage, config: AdaptConfig) -> AlignConfig:
    if stage.kind == CONSTANT:
        return AlignConfig()
    # a kept alignment term of the supervised stage is measured as the alignment stage measures it
    return stage.settings if isinstance(stage.settings, AlignConfig) else config.align


@dataclass
class Evaluated:
    """A recipe on a set of rows.

    Attributes:
        predictions: one a row.
        measured: rows that metrics are made of.
        similarity: to ICL, where it was measured.
        seconds: that the evaluation took.
        tokens_per_query: mean length of its prompts.
        reference: what similarities to ICL are measured against, where it was asked for and is at hand.
    """

    predictions: list[Prediction]
    measured: Measured
    similarity: Similarity | None
    seconds: float
    tokens_per_query: float
    reference: OnlineTargets | None = None


@dataclass
class Workbench:
    """See the module's text.

    Args:
        base: the model; the workbench puts an adapter on it until :meth:`close`.
        data: training and dev examples, and unlabelled rows where the settings name some.
        task: what counts as an answer.
        config: settings; its seed is used throughout.
        folder: where finished parts lie.
        one_recipe: the folder holds a single recipe, whose stages are then simply named.
        function: makes contexts, instead of ``config.context_function``.
        teaching: what the teacher gave, where another workbench shares it.
        unused: labelled rows in no split, from which ICL may draw fresh demonstrations.
        variant: part of the stages' folders, where several workbenches share one folder.
        by_content: stages' folders are named by all that a stage depends on, so that whatever recipes and
            settings have a stage in common share it.
    """

    base: BaseModel
    data: FewShotSplit
    task: Task
    config: AdaptConfig
    folder: Path
    one_recipe: bool = False
    function: ContextFunction | None = None
    teaching: TeacherCache = None  # type: ignore[assignment]  # made below unless it is shared
    unused: Sequence[Example] = ()
    variant: str = ""
    by_content: bool = False
    _used: set[Key] = field(default_factory=set)
    _fitted: dict[str, float] | None = None  # temperatures of the trained recipe, without dev rows

    def __post_init__(self) -> None:
        if len(self.data.train) < 2:
            raise DataError(f"{self.data.train.name}: at least two training examples are needed.")
        self.tokenizer = self.base.tokenizer
        if self.teaching is None:
            self.teaching = TeacherCache(
                self.base, self.data, self.task, self.config, self.folder, self.function
            )

    def with_config(self, config: AdaptConfig, variant: str) -> Workbench:
        """A workbench with other settings of adapter and stages, which shares what the teacher gives."""
        return Workbench(
            self.base,
            self.data,
            self.task,
            config,
            self.folder,
            self.one_recipe,
            teaching=self.teaching,
            unused=self.unused,
            variant=variant,
            by_content=self.by_content,
        )

    def of(self, data: FewShotSplit, folder: Path) -> Workbench:
        """A workbench of other rows, with a teacher of its own, that trains the same adapter."""
        bench = Workbench(
            self.base, data, self.task, self.config, folder, self.one_recipe, self.function,
            variant=self.variant, by_content=self.by_content,
        )  # fmt: skip
        # put where the cached properties look
        bench.__dict__.update(model=self.model, _initial=self._initial)
        return bench

    @cached_property
    def folds(self) -> list[Workbench]:
        """See :func:`ia2.experiment.cross_fitting.folds_of`."""
        from ia2.experiment.cross_fitting import folds_of

        return folds_of(self)

    @cached_property
    def model(self) -> Any:
        """The base model with a fresh adapter, which is put on when it is first asked for."""
        configuration = peft_config(self.base.model, self.config.adapter)
        self.base.adapted = attach(self.base.model, configuration, self.config.seed)
        return self.base.adapted

    @cached_property
    def _initial(self) -> dict[str, torch.Tensor]:
        return adapter_state(self.model)

    def close(self) -> None:
        """Take the adapter off; the base model is as before."""
        if "model" in self.__dict__:
            detach(self.model)
            del self.model
            for name in ("_initial", "folds"):
                self.__dict__.pop(name, None)
            self.base.adapted = None

    def check(
        self,
        recipes: Sequence[str],
        test: Sequence[Example],
        elsewhere: Sequence[tuple[Task, Sequence[Example]]] = (),
    ) -> None:
        """Refuse what cannot work, before anything is trained or written.

        Args:
            recipes: those to be trained or evaluated.
            test: the rows they will be evaluated on.
            elsewhere: rows of other tasks that they will be evaluated on.

        Raises:
            DataError: a prompt or all demonstrations of one do not fit the context window.
            ConfigError: an adapter that is unknown or cannot work, layers that are not there.
            ModelError: attention modules that are not found.
        """
        stages = [stage for recipe in recipes for stage in plan(recipe, self.config)]
        virtual = 0
        if stages:
            check_trackers(self.config.report_to)
            virtual = check_adapter(
                self.base.model,
                self.config.adapter,
                activation_checkpointing=self.config.activation_checkpointing,
            )
        capture = ActivationCapture(self.base.model, self.config.attention_modules)
        for stage in stages:
            if stage.aligns:
                self._check_alignment(stage, capture)
        for part in {part for stage in stages for part in answered_parts(stage)}:
            if len(self.teaching.examples[part]):
                self.teaching.contexts(part)
        if stages:
            train, dev = self.sft_rows()
            for rows in (train, dev):
                for place in range(len(rows)):
                    rows.row(place)
            for trained in (self.data.train, self.data.unlabelled, self.data.unlabelled_dev):
                self._check_bare(trained, self.task, virtual)
        for task, rows_of in ((self.task, self.data.dev), (self.task, test), *elsewhere):
            if any(recipe != "icl" for recipe in recipes):
                self._check_bare(rows_of, task, virtual)
            if "icl" in recipes:
                self._icl_contexts(rows_of, task)
        compared = test[:SIMILARITY_QUERIES] if any(recipe != "icl" for recipe in recipes) else ()
        if len(compared) and self.teaching.has_context(compared):
            self.teaching.prompts.pool_contexts(compared)

    def _check_bare(self, rows: Sequence[Example], task: Task, virtual: int) -> None:
        """Prompts without context must leave room for an adapter's virtual tokens."""
        prompts = self.teaching.prompts
        query_prompts(prompts.format, rows, prompts.window, self._reserve(task), virtual)

    def _reserve(self, task: Task) -> int:
        # answers to rows of another task may be longer
        return max(self.teaching.prompts.reserve, task.reserve)

    def _check_alignment(self, stage: PlannedStage, capture: ActivationCapture) -> None:
        settings = _alignment_section(stage, self.config)
        site = OBJECTIVES[settings.objective].site
        ActivationCapture(self.base.model, self.config.attention_modules, site=site)
        # the real shift is known only after the teacher pass; any will do to see whether it is asked for
        choose_layers(settings.layers, dict(capture), lambda: [0.0] * len(capture.layers))

    @property
    def train_contexts(self) -> Contexts:
        """Every training example in its context."""
        return self.teaching.contexts("train")

    # -------------------------------------------------------------------------------- training

    def learning_rates(self, stages: Sequence[PlannedStage]) -> list[float]:
        """Rates to try: the given ones, or what the last of these stages has by default."""
        usual = stages[-1].settings.learning_rate or default_learning_rate(self.config.adapter)
        return self.config.learning_rates or [usual]

    def train(self, recipe: str) -> TrainedRecipe:
        """Train a recipe at every learning rate (and β) and keep the best, by what ``selection`` says.

        Raises:
            DivergedError: none of them is left.
            ConfigError: a loss that is not finite before anything is trained.
        """
        from ia2.experiment.cross_fitting import cross_fitted

        trained = cross_fitted(self, recipe) if self.config.crosses else self._best(recipe)
        self.use(trained.state)
        self._fitted = trained.temperatures
        return trained

    def _best(self, recipe: str) -> TrainedRecipe:
        """The best by the dev rows, if there are any."""
        stages = plan(recipe, self.config)
        best: TrainedRecipe | None = None
        tried: dict[str, float] = {}
        diverged: dict[str, str] = {}
        betas: list[float | None] = next((s.betas for s in stages if s.betas != [None]), [None])
        for rate, beta in product(self.learning_rates(stages), betas):
            done = self.attempt(stages, rate, beta)
            name = self.attempt_name(rate, beta)
            tried[name] = loss = done[-1].selection_loss
            if done[-1].diverged is not None:
                diverged[name] = self.divergence(recipe, stages, done)
            # without dev rows all are nan, and the first stays
            elif best is None or loss < best.stages[-1].selection_loss:
                best = TrainedRecipe(recipe, done, tried, "dev loss", diverged)
        if best is None:
            raise self.all_diverged(recipe, diverged)
        if not len(self.data.dev):
            best.selected_by = "given" if len(tried) == 1 else "first (no dev rows)"
        return best

    def attempt(
        self, stages: Sequence[PlannedStage], rate: float, beta: float | None = None
    ) -> list[StageResult]:
        """Train stages one after the other, from fresh weights; the last has diverged, or none has.

        Args:
            stages: at least one.
            rate: of stages without one of their own.
            beta: of the joint stage.
        """
        state, key, done = self._initial, "", []
        self._used = set()
        passes = teacher_passes(stages, self.config)
        for place, stage in enumerate(stages):
            # `align` is the same stage in `ia2` and in `ia2-sft`: the folder names what came before
            chain = stages[: place + 1]
            own_beta = beta if stage.betas != [None] else None
            result = self._stage(stage, chain, rate, own_beta, beta, state, key, passes[place])
            done.append(result)
            state, key = result.state, result.key
            if result.diverged is not None:
                break
        return done

    @staticmethod
    def attempt_name(rate: float, beta: float | None) -> str:
        """What messages and results call an attempt."""
        return f"{rate:g}" if beta is None else f"{rate:g}, β {beta:g}"

    def divergence(self, recipe: str, stages: Sequence[PlannedStage], done: Sequence[StageResult]) -> str:
        """Where an attempt diverged, in words.

        Raises:
            ConfigError: before the first step, which no rate helps.
        """
        last, stage = done[-1], stages[len(done) - 1]
        if last.diverged == 0 and len(done) == 1:
            raise ConfigError(self._senseless(recipe, stage))
        own = stage.settings.learning_rate
        at = "" if own is None else f" with its rate {own:g}"
        return f"{last.name}{at} at step {last.diverged}"

    def all_diverged(self, recipe: str, diverged: dict[str, str]) -> DivergedError:
        """What is raised when no attempt is left."""
        rates = ", ".join(f"{name} ({where})" for name, where in diverged.items())
        own = [s for s in plan(recipe, self.config) if s.settings.learning_rate is not None]
        lower = " and ".join(["learning_rates", *dict.fromkeys(f"{s.kind}.learning_rate" for s in own)])
        usual = f" (usual here: {default_learning_rate(self.config.adapter):g})"
        return DivergedError(
            f"recipe '{recipe}' diverged at every learning rate: {rates}. Lower {lower}{usual}; in the same "
            "output folder that needs --overwrite.",
            rates,
        )

    def _senseless(self, recipe: str, stage: PlannedStage) -> str:
        advice = half_precision(self.base.model) or (
            f"Look at adapter.alpha, at the weights and temperatures of {stage.kind}, and at the model "
            "itself (`ia2 probe`)."
        )
        return (
            f"recipe '{recipe}': the loss of its stage {stage.kind} is not finite before the first step, "
            f"so no rate helps. {advice}"
        )

    @property
    def teacher_seconds(self) -> float:
        """What the teacher passes cost that the last trained recipe used."""
        own = sum(self.teaching.seconds(*key) for key in sorted(self._used, key=str))
        return own + sum(fold.teacher_seconds for fold in self.__dict__.get("folds", ()))

    def use(self, state: dict[str, torch.Tensor]) -> None:
        """Put these adapter weights on the model."""
        load_adapter_state(self.model, state)

    def stage_folder(self, chain: Sequence[PlannedStage], rate: float, beta: float | None = None) -> Path:
        """Where a stage's result lies; ``chain``: the stages up to this one."""
        return self.folder / self.variant / stage_place(chain, rate, beta, alone=self.one_recipe)

    def _stage(
        self,
        stage: PlannedStage,
        chain: Sequence[PlannedStage],
        tried: float,
        beta: float | None,
        chain_beta: float | None,
        start: dict[str, torch.Tensor],
        parent: str,
        needed: Pass | None,
    ) -> StageResult:
        settings = stage.settings
        rate = settings.learning_rate or tried
        folder = self.stage_folder(chain, tried, chain_beta)
        if needed is not None:
            self._used |= {(part, *needed) for part in answered_parts(stage)}
            if stage.aligns and "top-" in str(_alignment_section(stage, self.config).layers):
                # what the layers' shift is measured on
                self._used.add((_aligned_part(stage), "output", None))
        key = digest(
            {
                "format": FORMAT,
                "stage": stage.kind,
                "settings": settings.model_dump(),
                "length": self.config.selection if settings.epochs is None else None,
                "kept": self.config.align.model_dump() if stage.aligns and stage.kind == SFT else None,
                "parent": parent or digest([(k, list(v.shape)) for k, v in start.items()]),
                "rate": rate,
                "beta": beta,
                "model": self.base.identity,
                "adapter": self.config.adapter.model_dump(),
                "train": self.data.train.fingerprint,
                "dev": self.data.dev.fingerprint,
                "chat": [self.config.chat, self.config.thinking],
                "targets": self.teaching.fingerprint(self.train_contexts) if stage.teacher_answers else None,
                **self._unlabelled_facts(stage),
                "batch_size": self.config.batch_size,
                "seed": self.config.seed,
                "labels": self.task.labels,
            }
        )
        if self.by_content:
            folder = self.folder / "stages" / key
        if (folder / "stage.json").is_file():
            return finished_stage(stage.kind, tried, folder, key)
        align = self._how(stage) if stage.aligns else None
        rows = self._rows(stage, align, needed)
        selection = self.sft_rows()[1] if stage.kind == JOINT else None
        self.use(start)
        job = StageJob(stage, rate, tried, beta, rows, folder, key, align, selection)
        return run_stage(self.model, self.tokenizer, self.config, job)

    def _unlabelled_facts(self, stage: PlannedStage) -> dict[str, Any]:
        """What a stage on unlabelled rows depends on beside."""
        if UNLABELLED not in stage.rows:
            return {}
        teaching = self.teaching
        queries = [teaching.fingerprint(teaching.contexts(part)) for part in PARTS[UNLABELLED]]
        return {"rows": stage.rows, UNLABELLED: queries}

    def _how(self, stage: PlannedStage) -> AlignConfig:
        """How a stage measures alignment: its layers are ``all``, or their indices."""
        section = _alignment_section(stage, self.config)
        if section.layers == "all":
            return section
        capture = ActivationCapture(self.base.model, self.config.attention_modules)
        part = _aligned_part(stage)
        layers = choose_layers(section.layers, dict(capture), lambda: self.teaching.shift(part))
        return section.model_copy(update={"layers": layers})

    def _rows(
        self, stage: PlannedStage, align: AlignConfig | None, needed: Pass | None = None
    ) -> tuple[AnswerDataset, AnswerDataset]:
        """Training and dev rows of a stage; ``needed``: the teacher pass, by default the stage's own."""
        from ia2.training.dataset import AnswerDataset

        needed = needed or _own_pass(stage, self.config)
        if needed is None:
            return self.sft_rows()
        train = AnswerDataset.joined(
            [self._learnt(PARTS[kind][0], stage, align, needed) for kind in stage.rows]
        )
        dev = self._learnt(held_out(stage), stage, align, needed)
        if stage.beside:
            labelled = self._beside(stage, needed)
            train, dev = replace(train, beside=labelled[0]), replace(dev, beside=labelled[1])
        if self.one_recipe:  # behind the passes, which have the answers that this asks for
            self.teaching.warn_if_icl_fails(unlabelled=UNLABELLED in stage.rows)
        return train, dev

    def _learnt(
        self, part: str, stage: PlannedStage, align: AlignConfig | None, needed: Pass
    ) -> AnswerDataset:
        """One part's rows, as a stage learns from them."""
        settings, labelled = stage.settings, part in PARTS[LABELLED]
        assert isinstance(settings, TaughtConfig)
        if isinstance(settings, SftConfig) and labelled and not stage.labelled_answers:
            return self.sft_rows()[PARTS[LABELLED].index(part)]
        given = self.teaching.targets(part, *needed)
        return self.teacher_rows(
            part,
            targets=given if align is not None else None,
            soft=given if isinstance(settings, SoftConfig) else None,
            true_answers=labelled and stage.answers == "ground_truth" and not stage.beside,
            only_correct=labelled and settings.only_correct,
            spans=align is not None and OBJECTIVES[align.objective].site == "weights",
        )

    def _beside(self, stage: PlannedStage, needed: Pass | None) -> tuple[AnswerDataset, AnswerDataset]:
        """Labelled rows of a joint stage that aligns on others."""
        if stage.answers == "ground_truth":
            return self.sft_rows()
        assert needed is not None
        for part in PARTS[LABELLED]:
            self.teaching.targets(part, *needed)  # whose answers they are
        train, dev = (self.teacher_rows(part) for part in PARTS[LABELLED])
        return train, dev

    def teacher_rows(
        self,
        part: str,
        *,
        targets: OnlineTargets | None = None,
        soft: OnlineTargets | None = None,
        true_answers: bool = False,
        only_correct: bool = False,
        spans: bool = False,
    ) -> AnswerDataset:
        """Rows of one part with the teacher's answers.

        Args:
            part: a value of :data:`ia2.teacher.cache.PARTS`.
            targets: activations to align with.
            soft: token distributions to distil.
            true_answers: cross-entropy is on the true answers, the teacher's are only aligned with.
            only_correct: leave out the examples that the teacher answers wrongly.
            spans: rows tell how many ids both contexts share (attention weights).

        Raises:
            DataError: it answers no training example rightly.
        """
        from ia2.training.dataset import AnswerDataset, AnswerRow

        teaching, examples = self.teaching, self.teaching.examples[part]
        keep: Sequence[int] = range(len(examples))
        if only_correct:
            keep = teaching.correct(part)
            if not keep and part == "train":
                raise DataError(
                    f"{self.data.train.name}: only_correct leaves no training example: the teacher answers "
                    "none rightly. Leave it out; `ia2 probe` tells whether alignment can help here."
                )
        contexts = teaching.contexts(part) if len(examples) else None
        answers = teaching.answers(part)
        given = targets or soft
        online = given is not None and given.online

        def make(i: int, permutation: int) -> AnswerRow:
            assert contexts is not None
            response = answers[i].ids
            return AnswerRow(
                contexts.query_ids(i),
                self.task.target_ids(self.tokenizer, examples[i]) if true_answers else response,
                response,
                contexts.context_ids(i, permutation) if online else (),
                span(contexts, i, response) if spans else 0,
            )

        return AnswerDataset(make, keep, targets, soft)

    def sft_rows(self) -> tuple[AnswerDataset, AnswerDataset]:
        """Training and dev rows of the supervised stage: queries and true answers."""
        from ia2.training.dataset import AnswerDataset, AnswerRow

        def rows(examples: Sequence[Example]) -> AnswerDataset:
            def make(i: int, permutation: int) -> AnswerRow:
                return AnswerRow(
                    self.teaching.prompts.format.query_ids(examples[i]),
                    self.task.target_ids(self.tokenizer, examples[i]),
                )

            return AnswerDataset(make, range(len(examples)))

        return rows(self.data.train), rows(self.data.dev)

    # ------------------------------------------------------------------------------ evaluation

    def prompts(
        self, examples: Sequence[Example], *, demonstrations: bool = False, task: Task | None = None
    ) -> Sequence[Ids]:
        """Prompt ids, with the context (demonstrations, as `icl` shows them) or without.

        Args:
            examples: the queries.
            demonstrations: with the context.
            task: of the queries, where it is another one.
        """
        if demonstrations:
            contexts = self._icl_contexts(examples, task or self.task)
            return [contexts.context_ids(i) for i in range(len(examples))]
        return self.teaching.prompts.query_prompts(examples)

    def _icl_contexts(self, examples: Sequence[Example], task: Task) -> Contexts:
        reserve = self._reserve(task)
        if self.config.icl_demonstrations == "fresh":
            return self.teaching.prompts.fresh_contexts(examples, self.unused, reserve)
        return self.teaching.prompts.pool_contexts(examples, reserve=reserve)

    def evaluate(
        self,
        recipe: str,
        test: Sequence[Example],
        reference: OnlineTargets | None = None,
        task: Task | None = None,
        temperatures: dict[str, float] | None = None,
        *,
        refer: bool = False,
    ) -> Evaluated:
        """Evaluate what the model is now: ``base`` and ``icl`` switch the adapter off.

        Args:
            recipe: its name; ``icl`` puts the training examples into the prompts.
            test: labelled rows.
            reference: measure similarity to these activations too (not for ``icl`` itself).
            task: of the test rows, where they are of another distribution with other labels.
            temperatures: fitted before; None takes those of cross-fitting, or fits them on the dev rows.
            refer: of ``icl``, give the reference too, where the same pass has it: for answers of one token.
        """
        task = task or self.task
        began = time.perf_counter()
        in_context = recipe == "icl"
        model = self.model if is_trained(recipe) else self.base.current
        off = nullcontext() if is_trained(recipe) else base_weights(model)
        # One-token answers need no teacher forcing, so one pass gives scores and activations.
        meter = capture = taken = None
        said: dict[int, int] = {}
        if reference is not None and not in_context and task.single_token:
            meter = SimilarityMeter(reference.layers)
            capture = ActivationCapture(model, self.config.attention_modules)
        test_prompts = self.prompts(test, demonstrations=in_context, task=task)
        if refer and task.single_token and self.teaching.refers_to(test, test_prompts):
            capture = ActivationCapture(model, self.config.attention_modules)
            taken = TargetStore(capture.layers)

        def take(output: AnswerOutput) -> None:
            if taken is not None and output.index < SIMILARITY_QUERIES:
                assert output.logits is not None and output.activations is not None
                taken.add(output.index, 0, output.activations)
                said[output.index] = int(output.logits[0].argmax())
            elif meter is not None and reference is not None and output.index < len(reference.answers):
                _compare(meter, output, reference)

        if temperatures is None and is_trained(recipe):
            temperatures = self._fitted
        fit = temperatures is None and (len(self.data.dev) > 0 or self.config.crosses)
        # without test rows the dev rows are evaluated: one pass for both
        with_fit = fit and test is self.data.dev and task is self.task and self._keeps_scores(len(test))
        with off:
            if fit and not with_fit:
                temperatures = fitted_temperatures(self.temperature_losses(in_context=in_context))
            with capture or nullcontext():
                predictions, measured = evaluate_prompts(
                    model,
                    self.tokenizer,
                    task,
                    test,
                    test_prompts,
                    temperatures,
                    fit=with_fit,
                    capture=capture,
                    on_output=take,
                    description=f"evaluating {recipe}",
                )
            seconds = time.perf_counter() - began
            similarity = meter.join().finish() if meter is not None else None
            if reference is not None and not in_context and similarity is None:
                similarity = _similarity(self._forced(model, recipe, test, reference), reference)
        if taken is not None:
            tokens = {i: token for part in gathered(said) for i, token in part.items()}
            taken.finish(
                [TeacherAnswer((t,), decode(self.tokenizer, [t])) for _, t in sorted(tokens.items())]
            )
        prompt_tokens = sum(len(prompt) for prompt in test_prompts) / len(test_prompts)
        return Evaluated(predictions, measured, similarity, seconds, prompt_tokens, taken)

    def temperature_losses(self, *, in_context: bool = False) -> dict[str, np.ndarray]:
        """What temperatures are fitted on: the dev rows, as the model is now.

        Without dev rows, the training rows, each in context without itself; right for what is not trained on
        them.
        """
        rows = self.data.dev
        if len(rows):
            prompts = self.prompts(rows, demonstrations=in_context)
        elif in_context:
            rows, contexts = self.data.train, self.train_contexts
            prompts = [contexts.context_ids(i) for i in range(len(rows))]
        else:
            rows = self.data.train
            prompts = self.prompts(rows)
        model = self.base.current
        return temperature_losses(model, self.tokenizer, self.task, rows, prompts)

    def _keeps_scores(self, rows: int) -> bool:
        """Whether the logits of so many rows, from which temperatures are fitted, may stay in memory."""
        if self.task.kind != "classification":
            return True  # generated answers do not depend on temperatures, and no logits are kept
        positions = 1 if self.task.single_token else sum(len(ids) + 1 for ids in self.task.label_ids)
        return rows * positions * self.base.model.get_output_embeddings().weight.shape[0] <= MAX_LOGITS

    def base_similarity(
        self,
        test: Sequence[Example],
        reference: OnlineTargets,
        outputs: Sequence[AnswerOutput] | None = None,
    ) -> Similarity:
        """Of the base model without demonstrations, of which nothing else is evaluated.

        Args:
            test: the queries.
            reference: what it does with demonstrations.
            outputs: what :meth:`base_outputs` gave on these queries. Of one-token answers, which are not fed,
                they are the same whatever the reference.
        """
        with base_weights(self.base.current):
            forced = self._forced(self.base.current, "base", test, reference)
            return _similarity(forced if outputs is None else outputs, reference)

    def base_outputs(self, test: Sequence[Example], reference: OnlineTargets) -> list[AnswerOutput]:
        """Activations of the base model without demonstrations, forced on the answers of the reference."""
        with base_weights(self.base.current):
            return list(self._forced(self.base.current, "base", test, reference))

    def _forced(
        self, model: Any, recipe: str, test: Sequence[Example], reference: OnlineTargets
    ) -> Iterator[AnswerOutput]:
        """Both models are teacher-forced on the ICL answer ``Ŷ`` (METHOD: measures)."""
        prompts = self.prompts(test[: len(reference.answers)])
        pairs = [(prompt, answer.ids) for prompt, answer in zip(prompts, reference.answers, strict=True)]
        mine = share(len(pairs), lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        with ActivationCapture(model, self.config.attention_modules) as capture:
            for output in answer_pass(
                model,
                self.tokenizer,
                [pairs[i] for i in mine],
                capture=capture,
                logits=False,
                description=f"similarity {recipe}",
            ):
                yield replace(output, index=mine[output.index])


def _similarity(outputs: Iterable[AnswerOutput], reference: OnlineTargets) -> Similarity:
    meter = SimilarityMeter(reference.layers)
    for output in outputs:
        _compare(meter, output, reference)
    return meter.join().finish()


def _compare(meter: SimilarityMeter, output: AnswerOutput, reference: OnlineTargets) -> None:
    target = reference.get(output.index)
    assert output.activations is not None and target is not None
    meter.add(output.index, output.activations, target)

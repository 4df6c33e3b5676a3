"""The sections of ``analysis.json``, a module each."""

from ia2.analysis.section import AnalysisSection
from ia2.analysis.sections import activations, causal, effects, heads, lens, neurons, weights

SECTIONS: dict[str, AnalysisSection] = {
    "activations": activations.SECTION,
    "weights": weights.SECTION,
    "lens": lens.SECTION,
    "heads": heads.SECTION,
    "neurons": neurons.SECTION,
    "causal": causal.SECTION,
    "effects": effects.SECTION,
}
"""What can be analysed, in the order of a report."""

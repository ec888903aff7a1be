"""What the studies share; a study states its question, its settings and its figure.

To write a new study, ``examples/reproduce/NAME.py``:

1. Write the question as the module's docstring: ``--help`` prints it.
2. Write a dataclass ``Config(common.Config)``, a docstring below each setting, and a dict
   ``SMOKE`` of settings so small that everything runs within seconds.
3. Write ``compute(config, piece)``, which returns the results as dicts, lists and numbers.
   Give long work to ``piece(name, function)``: a killed run goes on after the last piece.
   Train with ``common.compare`` where methods are tuned and then run for several seeds.
4. Summarize with ``statistics``: put the runs in a table, a row each, group it with pandas,
   and take ``mean_and_error`` of paired differences.
5. Write ``draw(report)``, which returns a figure from what the JSON file holds.
6. Write ``lines(report)``, the lines to print, and end with
   ``common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)``.

``python examples/reproduce/NAME.py`` then writes ``docs/results/NAME.json`` and
``docs/images/NAME.png``; ``--smoke`` is the tiny version, ``--redraw`` only draws. The page
``docs/reproduce/NAME.md`` may quote numbers of that JSON file alone: a test compares them.

For every study: ``runs`` (settings, pieces, files), ``methods`` (grids, tuning, a training
step), ``statistics`` (means and errors, pairs, rank correlations), ``cells`` (methods over
networks and label noise), ``data`` and ``figures``. Networks and their training:
``square_loss`` (alignment, escape), ``fitted``, ``optimizers`` and ``settling`` (edge),
``side_by_side``, ``networks`` and ``bound`` (generalisation), ``one_loss`` and ``measures``
(sharpness_study), ``residual`` (cifar10), ``photographs`` (rounding_cifar,
forgetting_cifar), ``text`` (edge), ``language`` (transformer, transformer_methods,
rounding_text, forgetting_text), ``after`` and ``links`` (rounding, forgetting, merging),
``goals`` (rounding, rounding_cifar), ``frontiers`` (forgetting, forgetting_cifar,
forgetting_text), ``again`` (forgetting), ``merge`` (merging), ``radii``,
``held``, ``added`` and ``strategies`` (radius).
"""

from .data import split_digits
from .methods import Method, compare, grid, step
from .runs import ROOT, Config, main, prepare, run, settings, shown
from .statistics import mean_and_error

__all__ = [
    "ROOT",
    "Config",
    "Method",
    "compare",
    "grid",
    "main",
    "mean_and_error",
    "prepare",
    "run",
    "settings",
    "shown",
    "split_digits",
    "step",
]

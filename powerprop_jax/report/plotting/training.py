"""What happens in training: metrics, densities of layers, masks that move."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from powerprop_jax.files.tables import Record
from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import drawing, style


def learning_curves(
  records: Sequence[Record],
  *,
  fields: Sequence[str] = ('loss', 'accuracy'),
  title: str = '',
) -> Figure:
  """Metrics against the training step, one line for each α.

  Args:
    records: those of metrics.jsonl, with step, alpha (and key); a record may
      lack some of the fields.
    fields: what to draw, one pair of axes for each that occurs. Names that end
      in 'loss' get a logarithmic scale, in 'accuracy' are shown in per cent.
  """
  drawn = [f for f in fields if any(f in record for record in records)]
  if not drawn:
    raise ValueError(f'no record has any of the fields {", ".join(fields)}.')
  points = [
    record
    for record in records_lib.usable(records, 'alpha', 'step')
    if any(field in record for field in drawn)
  ]
  scheme = style.by_alpha(points)
  with style.house_style():
    figure, grid = style.panels(len(drawn))
    for axes, field in zip(grid, drawn, strict=True):
      drawing.lines(axes, points, 'step', field, scheme)
      if field.endswith('loss'):
        drawing.log_axis(axes)
      if field.endswith('accuracy'):
        drawing.share_axis(axes)
      unit = ' (%)' if field.endswith('accuracy') else ''
      axes.set_title(field.replace('_', ' ') + unit)
      drawing.step_axis(axes)
    note = records_lib.spread_note(points, *drawn)
    style.frame(figure, title, note, style.handles(scheme.looks.values()))
  return figure


def layer_densities(records: Sequence[Record], *, title: str = '') -> Figure:
  """Density of each layer against the training step, a line for each method.

  Args:
    records: one per evaluation and layer, with method, step, layer,
      density and, if there are several, key and alpha. Give those of one
      density of the whole network: others would be averaged with them.

  Returns:
    A figure with a pair of axes for each layer, in the order of the records,
    all with the same logarithmic scale of densities. A density of 0 is a gap.
  """
  points = records_lib.usable(records, 'method', 'step', 'layer', 'density')
  scheme = style.by_method_and_alpha(points)
  layers = list(dict.fromkeys(point['layer'] for point in points))
  names = records_lib.short_names(layers)
  found = [p['density'] for p in points if records_lib.is_finite(p['density'])]
  with style.house_style():
    figure, grid = style.panels(len(layers))
    for axes, layer in zip(grid, layers, strict=True):
      drawing.density_axis(axes, found)
      of_layer = [point for point in points if point['layer'] == layer]
      drawing.lines(axes, of_layer, 'step', 'density', scheme)
      axes.set_title(names[layer])
      drawing.label_first(axes, 'weights left (%)')
      drawing.step_axis(axes)
    note = records_lib.spread_note(points, 'density')
    style.frame(figure, title, note, style.handles(scheme.looks.values()))
  return figure


def mask_churn(records: Sequence[Record], *, title: str = '') -> Figure:
  """Share of the connections that changed, a line for each method.

  Args:
    records: one per evaluation, of all layers together, with method, step,
      perhaps alpha, and one or both of churn and churn_from_start: the share of
      the connections that were not there at the evaluation before, and at the
      start; a pair of axes each. Give those of one density: others would be
      averaged with them.
  """
  points = records_lib.usable(records, 'method', 'step')
  drawn = [f for f in _CHURN if any(f in point for point in points)]
  if not drawn:
    raise ValueError(f'no record has any of the fields {", ".join(_CHURN)}.')
  points = [point for point in points if any(f in point for f in drawn)]
  scheme = style.by_method_and_alpha(points)
  with style.house_style():
    figure, grid = style.panels(len(drawn))
    for axes, field in zip(grid, drawn, strict=True):
      drawing.lines(axes, points, 'step', field, scheme)
      # Room for a line at 0, that of a mask that never moves.
      axes.set_ylim(-0.04 * axes.get_ylim()[1])
      drawing.share_axis(axes)
      axes.set_title(_CHURN[field])
      drawing.label_first(axes, 'connections changed (%)')
      drawing.step_axis(axes)
    note = records_lib.spread_note(points, *drawn)
    style.frame(figure, title, note, style.handles(scheme.looks.values()))
  return figure


_CHURN = {
  'churn': 'since the evaluation before',
  'churn_from_start': 'since the start',
}

"""What tests of figures share."""

import io

import matplotlib


def draw(figure):
  """Lays the figure out, as saving does; warnings are errors in the tests."""
  figure.savefig(io.BytesIO(), format='png', dpi=50)
  return figure


def line(axes, label):
  (found,) = (x for x in axes.lines if x.get_label() == label)
  return found


def texts(found):
  return [text.get_text() for text in found.findobj(matplotlib.text.Text)]


def legend(drawn):
  """Labels in the legend of a figure or of axes."""
  found = drawn.legends[0] if hasattr(drawn, 'legends') else drawn.get_legend()
  return [text.get_text() for text in found.get_texts()]


def titles(figure):
  return [axes.get_title(loc='left') for axes in figure.axes]

"""What a run has done, for people: tables, measurements, figures, one page.

Import the module you need. Everything but `plotting` is light; `plotting` is
the only one that needs matplotlib.
"""

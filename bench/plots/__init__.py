"""Figures from rows, drawn with matplotlib.

figure   a figure with its name and its rows
style    axes, colors, legends, and the stamp under every figure
ops, models, quality, tuning   the figures of `bench.plot`, by kind of row
html_page   the page of `bench.report`
"""

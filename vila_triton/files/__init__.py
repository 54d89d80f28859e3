"""Files, without torch: strict reading, atomic writing, locks, charts.

reading      checked files, strict JSON, values shortened for error messages
json_schema  which fields a JSON value must have
atomic       files that appear when they are whole
file_locks   files and folders that several processes write
svg_chart    charts of lines as SVG
"""

"""The report of an evaluation: charts, galleries and tables in one HTML file."""

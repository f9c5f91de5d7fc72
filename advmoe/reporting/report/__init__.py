"""The report: an HTML page that needs nothing but itself, Markdown, a model card. Every number comes from a file."""

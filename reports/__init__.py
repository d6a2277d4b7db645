"""The report: its terms, its token grammar, its schema, and every format that it is written in."""

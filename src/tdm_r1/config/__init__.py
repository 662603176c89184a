"""The settings of a run: a schema, recipes in YAML, overrides by dotted name. Free of torch."""

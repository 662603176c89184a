"""Tasks: where prompts come from, and what is measured that training does not use."""

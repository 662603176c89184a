"""Text-to-image flow models: one file a family, their roles, adapters and files."""

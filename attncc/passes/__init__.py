"""Pure rewrites of an attention variant, then the one step that lowers it to tiles."""

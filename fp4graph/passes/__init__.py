"""Graph passes: tag, select, choose, pack, rewrite."""

"""World folders: format, loading, saving; and the worlds that come with the package."""

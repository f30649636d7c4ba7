"""Images of the user's own: folders, archives and arrays, and the masks of their holes."""

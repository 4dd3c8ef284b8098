"""`ray-ds verify`: checks of a user's own cluster, each of which says what is wrong and what to do."""

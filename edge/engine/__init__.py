"""The bundle and what runs its graphs."""

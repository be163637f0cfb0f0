"""α that changes: by hand, by a controller, inside the step."""

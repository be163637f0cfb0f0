"""Programs that measure time. They print medians and ratios; none is a test."""

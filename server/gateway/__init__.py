"""The HTTP side. Reaches students only through the Backend seam."""

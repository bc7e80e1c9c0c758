"""Reports for people: one HTML file each, complete in itself."""

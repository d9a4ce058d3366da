"""What makes the site of the book out of its sources and pages."""

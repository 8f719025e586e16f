"""What a user gives: photos, labels to measure with, class names; and the way to pixels."""

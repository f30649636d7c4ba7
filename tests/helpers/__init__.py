"""What several test files share. Test files import nothing from each other."""

"""Tables of slides as people, spreadsheets and other projects write them: read, recognised, their values checked."""

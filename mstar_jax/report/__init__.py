"""The report: `page` puts the sections in order, `dynamics`, `figure2`, `tables` and `gallery` make them,
`figures` draws, `runs` reads what the workdirs hold."""

include: "workflow/Snakefile"


workflow.default_target = "all"  # Snakemake takes none from an included file

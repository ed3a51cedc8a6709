package cmd

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/plugins"
)

// conformProgram runs the suite on all components of a program, or the one that
// the options name. code is the worst of all.
func conformProgram(ctx context.Context, path string, o conformOptions, out io.Writer) (reports []*conformance.Report, code int, err error) {
	list, err := plugins.DescribeProgram(ctx, path)
	if err != nil {
		return conformStranger(ctx, path, o, err, out)
	}
	subject := conformance.Process(path).Options(o.config)
	if len(list) > 1 && (o.report != "" || o.junit != "") && o.component == "" {
		return nil, 2, fmt.Errorf("the program has %d components, but --report and --junit name one file: choose one with --component", len(list))
	}
	for _, d := range list {
		id := d.Kind + "/" + d.Name
		if o.component != "" && o.component != id {
			continue
		}
		report, c, err := o.conform(subject.Component(id), out)
		if err != nil {
			return nil, 2, err
		}
		reports, code = append(reports, report), max(code, c)
	}
	if len(reports) == 0 {
		return nil, 2, fmt.Errorf("the program has no component %q", o.component)
	}
	return reports, code, nil
}

// strangerChecks are the checks of a program that does not say what it is.
const strangerChecks = "plugin/(direct-run|negotiate|hostile-output)"

// conformStranger tries a program that does not describe itself, which no plugin
// may do. What it does when a node starts it tells more than that.
func conformStranger(ctx context.Context, path string, o conformOptions, why error, out io.Writer) ([]*conformance.Report, int, error) {
	if _, err := os.Stat(path); err != nil || ctx.Err() != nil {
		return nil, 2, why
	}
	fmt.Fprintf(out, "not conformant: %v\n", why)
	kind, name, ok := strings.Cut(o.component, "/")
	if !ok {
		kind, name = "manager", "unknown"
	}
	if o.run == "" {
		o.run = strangerChecks
	}
	subject := conformance.Plugin(conformance.PluginProgram{Path: path, Kind: kind, Name: name, Options: o.config})
	report, code, err := o.conform(subject, out)
	if err != nil {
		return nil, 2, err
	}
	return []*conformance.Report{report}, max(code, 1), nil
}

package cmd

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/admin"
	"github.com/longhouse-go/longhouse/core/container"
)

// maxAnswer bounds what is read from an admin API, in bytes.
const maxAnswer = 16 << 20

func newStatus() *cobra.Command {
	var addr string
	c := &cobra.Command{
		Use:   "status",
		Short: "Show members, plugins and sessions of a running node",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return printStatus(c.OutOrStdout(), &url.URL{Scheme: "http", Host: addr})
		},
	}
	c.Flags().StringVar(&addr, "admin", "127.0.0.1:8077", "address of the node's admin API")
	return c
}

func printStatus(out io.Writer, base *url.URL) error {
	client := &http.Client{Timeout: 5 * time.Second}
	get := func(path string, into any) error {
		resp, err := client.Get(base.JoinPath(path).String())
		if err != nil {
			return fmt.Errorf("no node answers at %s: %w; --admin chooses another address", base.Host, err)
		}
		defer resp.Body.Close()
		body := io.LimitReader(resp.Body, maxAnswer)
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s answers %s", path, resp.Status)
		}
		return json.NewDecoder(body).Decode(into)
	}

	var members []admin.Member
	var plugins []core.PluginStatus
	var sessions container.SessionReport
	for path, into := range map[string]any{"v1/members": &members, "v1/plugins": &plugins, "v1/sessions": &sessions} {
		if err := get(path, into); err != nil {
			return err
		}
	}

	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "MEMBER\tADDRESS\tALIVE\t")
	for _, m := range members {
		mark := ""
		if m.Local {
			mark = "this node"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", m.Name, m.Address, time.Duration(m.AliveSeconds*float64(time.Second)).Round(time.Second), mark)
	}
	fmt.Fprintln(w, "\nPLUGIN\tMODE\tSTATE\tPID\tSTARTS\tIN FLIGHT\tLAST ERROR")
	for _, p := range plugins {
		fmt.Fprintf(w, "%s/%s\t%s\t%s\t%d\t%d\t%d\t%s\n", p.Kind, p.Name, p.Mode, p.State, p.PID, p.Generation, p.InFlight, p.LastError)
	}
	fmt.Fprintln(w, "\nSESSIONS\tLIVE HERE\tKNOWN\tBYTES\tSTATE")
	for _, t := range sessions.Tables {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%s\n", t.Manager, t.Live, t.Status.Sessions, t.Status.Bytes, t.Status.State)
	}
	return w.Flush()
}

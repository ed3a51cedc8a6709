package singlesignon_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/table"
	"github.com/longhouse-go/longhouse/valves/singlesignon"
)

func check(user, password string) (roles []string, ok bool) {
	return []string{"clerk"}, user == "ada" && password == "engine"
}

// README: begin

// login is the only page that sees a password.
func login(w http.ResponseWriter, r *http.Request) {
	roles, ok := check(r.FormValue("user"), r.FormValue("password"))
	if !ok {
		http.Error(w, "wrong name or password", http.StatusForbidden)
		return
	}
	p := singlesignon.Principal{Name: r.FormValue("user"), Roles: roles, AuthType: "form"}
	if err := singlesignon.SignOn(r.Context(), p); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
	}
}

// orders may be a page of any application of the host.
func orders(w http.ResponseWriter, r *http.Request) {
	user, ok, err := singlesignon.User(r.Context())
	switch {
	case err != nil:
		http.Error(w, "please try again", http.StatusServiceUnavailable)
	case !ok || !user.HasRole("clerk"):
		http.Error(w, "please log in", http.StatusForbidden)
	default:
		_, _ = fmt.Fprintf(w, "orders of %s", user.Name)
	}
}

// logout ends the sign-on; so does ending one of its sessions.
func logout(w http.ResponseWriter, r *http.Request) {
	if err := singlesignon.SignOff(r.Context()); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
	}
}

// README: end

func Example() {
	valve, err := singlesignon.New(singlesignon.Default(), channel.Settings{})
	if err != nil {
		fmt.Println(err)
		return
	}
	sessions := table.New(table.Config{}, channel.Settings{})
	accounts := http.NewServeMux()
	accounts.HandleFunc("/login", login)
	accounts.HandleFunc("/logout", logout)
	engine, err := core.NewEngine(core.EngineOptions{Shared: sessions, Hosts: []core.HostOptions{{
		Name: "localhost", Valves: []core.Valve{valve}, Contexts: []core.ContextOptions{
			{Path: "/accounts", Handler: accounts, Sessions: sessions},
			{Path: "/shop", Handler: http.HandlerFunc(orders), Sessions: sessions},
		},
	}}}, channel.Settings{})
	if err != nil {
		fmt.Println(err)
		return
	}
	var cookies []*http.Cookie
	for _, target := range []string{"/shop/", "/accounts/login?user=ada&password=engine", "/shop/", "/accounts/logout", "/shop/"} {
		r := httptest.NewRequest(http.MethodGet, target, nil)
		for _, c := range cookies {
			r.AddCookie(c)
		}
		w := httptest.NewRecorder()
		engine.ServeHTTP(w, r)
		cookies = append(cookies, w.Result().Cookies()...)
		body, _ := io.ReadAll(w.Body)
		fmt.Println(strings.TrimSpace(fmt.Sprint(w.Code, " ", string(body))))
	}
	// Output:
	// 403 please log in
	// 200
	// 200 orders of ada
	// 200
	// 403 please log in
}

// The README shows the example as it is.
func TestReadme(t *testing.T) {
	src, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, code, ok := strings.Cut(string(src), "// README: begin\n")
	code, _, ok2 := strings.Cut(code, "// README: end")
	if !ok || !ok2 || !strings.Contains(string(doc), "```go\n"+strings.TrimSpace(code)+"\n```") {
		t.Errorf("the README does not show the example as it is:\n%s", code)
	}
}

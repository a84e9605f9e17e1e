package cay_test

import (
	"context"
	"fmt"
	"log"
	"os"

	cay "github.com/cayhq/cay/sdk/go"
)

// This program creates a sandbox, runs Python in it, prints what it wrote, and destroys the sandbox.
func Example() {
	ctx := context.Background()
	c, err := cay.New("http://127.0.0.1:7070", os.Getenv("CAY_API_KEY"))
	if err != nil {
		log.Fatal(err)
	}
	sandbox, err := c.CreateSandbox(ctx, cay.CreateSandboxRequest{Template: "python"}, cay.CreateOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.DestroySandbox(ctx, sandbox.ID)

	result, err := c.Execute(ctx, sandbox.ID, cay.ExecuteRequest{Args: []string{"python3", "-c", "print(6*7)"}})
	if err != nil {
		log.Print(err)
		return
	}
	fmt.Printf("exit code %d: %s", result.ExitCode, result.Stdout)
}

// A refused call returns an Error with a stable code.
func ExampleHasCode() {
	c, err := cay.New("http://127.0.0.1:7070", os.Getenv("CAY_API_KEY"))
	if err != nil {
		log.Fatal(err)
	}
	if _, err := c.GetSandbox(context.Background(), "sbx_abcdefghijklmnopqrst"); cay.HasCode(err, "sandbox_not_found") {
		fmt.Println("there is no such sandbox")
	}
}

// An iterator reads a listing page by page.
func ExampleClient_Sandboxes() {
	c, err := cay.New("http://127.0.0.1:7070", os.Getenv("CAY_API_KEY"))
	if err != nil {
		log.Fatal(err)
	}
	running := cay.ListSandboxesOptions{Status: []cay.SandboxStatus{cay.SandboxStatusRunning}}
	for sandbox, err := range c.Sandboxes(context.Background(), running) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(sandbox.ID, sandbox.Template)
	}
}
